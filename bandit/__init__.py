"""Arms, policies and reward. Knows device profiles and prices; nothing of methods, MQTT or torch."""
