"""Chaos: the real programs as processes over a real Mosquitto, killed, cut, starved and lied to, by seed."""
