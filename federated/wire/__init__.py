"""What travels: messages, frames, pieces."""
