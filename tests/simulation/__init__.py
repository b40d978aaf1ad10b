"""Deterministic simulation: the real coordinator and agents on a virtual clock, a broker and disks that
misbehave by seed."""
