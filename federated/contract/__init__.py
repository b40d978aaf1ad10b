"""What a method is and what it may do."""
