"""Tasks that exist, and which plain tensors each trains beside the factors. The coordinator needs both without torch."""

from .errors import ConfigError

LABELLED = ("text_classification", "image_classification")
KINDS = (*LABELLED, "text_regression", "causal_lm")


def head_shapes(kind: str, labels: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape. Raises ConfigError for an unknown task, and for labels that are missing or mean nothing."""
    if kind not in KINDS:
        raise ConfigError(f"task `{kind}` is not known", f"one of {', '.join(KINDS)}")
    if kind in LABELLED and not labels:
        raise ConfigError(f"task `{kind}` needs `labels`, in the order of the head's rows")
    if kind not in LABELLED and labels:
        raise ConfigError(f"task `{kind}` has no labels", "remove `task.labels`")
    if kind == "causal_lm":
        return {}
    rows = labels if kind in LABELLED else 1
    return {"head.bias": (rows,), "head.weight": (rows, hidden)}
