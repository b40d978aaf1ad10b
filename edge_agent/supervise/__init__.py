"""The worker process and what it may use of the machine."""
