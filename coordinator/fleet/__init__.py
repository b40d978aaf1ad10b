"""Devices: who is enrolled, with which keys and certificates."""
