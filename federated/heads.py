"""Which plain tensors a task trains beside the factors. Shapes only: the coordinator needs them without torch."""

from .errors import ConfigError

KINDS = ("text_classification", "image_classification")


def head_shapes(kind: str, labels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape. Raises ConfigError for an unknown task."""
    if kind in KINDS:
        return {"head.bias": (labels,), "head.weight": (labels, hidden)}
    raise ConfigError(f"task `{kind}` is not known", f"one of {', '.join(KINDS)}")
