"""A shop: FastAPI, SQLAlchemy, and streamworker for what happens after an order."""
