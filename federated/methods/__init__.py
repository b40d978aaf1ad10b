"""One published method, one file, both sides in it; the file's name is its registration."""
