"""Integrations: one module for each library that streamworker works with, and an extra of the same name.

Nothing of the core imports them: `streamworker.postgres.adapters` finds one by the class of the connection it is given.
"""
