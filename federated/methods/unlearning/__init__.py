"""What is forgotten, and how that is undone."""
