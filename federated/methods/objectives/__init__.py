"""What a device minimises."""
