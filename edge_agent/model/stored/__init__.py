"""Models on disk: read, prepared, in pieces."""
