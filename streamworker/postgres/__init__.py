"""The durable record in PostgreSQL."""
