"""Servers under a test's control: an SMTP server that misbehaves on demand, and a receiver of webhooks."""
