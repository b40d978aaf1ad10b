"""The pieces of a forward and a backward pass."""
