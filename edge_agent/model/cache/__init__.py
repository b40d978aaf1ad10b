"""What unchanging lower layers put out, kept."""
