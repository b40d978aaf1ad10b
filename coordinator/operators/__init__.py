"""Who may decide, and with which signature."""
