"""What nobody may learn of a device's data."""
