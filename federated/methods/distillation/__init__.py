"""What devices learn from each other's predictions."""
