"""A job's life: open a round, wait, close it; then install the result."""
