"""flwr's side of a benchmark; runs in its own environment."""
