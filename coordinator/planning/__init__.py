"""From a version and the tuner's arms to what each device is told."""
