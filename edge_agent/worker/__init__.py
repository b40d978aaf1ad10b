"""The process that trains: it gets an order and leaves a folder."""
