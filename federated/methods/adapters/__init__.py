"""Which factors of the adapter are trained and sent."""
