"""Arms, policies and reward. Knows device profiles and prices; nothing of methods, MQTT or torch.

The linter of the same import name must not share the environment; both programs check at start that this one is ours.
"""

OURS = "rankfleet"
