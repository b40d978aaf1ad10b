"""A job as it is written, and everything that follows from it."""
