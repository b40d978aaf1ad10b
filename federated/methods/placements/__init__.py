"""Which layers a device trains."""
