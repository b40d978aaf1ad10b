"""What runs in processes of their own for `make bench-device` and `make bench-memory`."""
