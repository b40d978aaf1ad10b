"""What a device is, what a model is, and what an arm costs on one of the other."""
