"""What a coordinator lets in."""
