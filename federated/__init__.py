"""What both sides share: the method contract, messages, topics, bytes and tensors.

Import light on purpose: the idle agent imports this package and must not pull in NumPy or torch.
"""
