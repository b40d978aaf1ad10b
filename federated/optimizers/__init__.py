"""How the coordinator steps."""
