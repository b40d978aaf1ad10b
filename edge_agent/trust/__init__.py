"""Who this device is, whom it obeys, and what its owner allows."""
