"""The HTTP API that the CLI speaks."""
