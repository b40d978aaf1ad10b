"""One policy, one file; the file's name is its registration."""
