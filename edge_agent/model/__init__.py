"""The base model and its adapters on the device: loading, few-bit storage, the forward and backward pass."""

from .base import Base, as_tensor

__all__ = ["Base", "as_tensor"]
