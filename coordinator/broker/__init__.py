"""The MQTT broker that a coordinator brings along, and who may do what on it."""
