"""Many updates to one."""
