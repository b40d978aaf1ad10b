"""What leaves the device, in fewer bytes."""
