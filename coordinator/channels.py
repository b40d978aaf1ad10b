"""One order of importance for the feed-forward channels of each layer, so that every pruning ratio is nested in the next.

Importance is the product of a channel's norms on its way in and out, ‖W_up[j]‖·‖W_down[:, j]‖, summed over gated maps: what
can be known before the first round, without data (docs/specification.md, Pruning: a fair start for FFN channels).
"""

from pathlib import Path

import numpy as np

from federated.tensors import Array
from federated.update import Masks
from profiles.card import ModelCard
from profiles.cost import kept


def importance(folder: Path, card: ModelCard) -> dict[int, Array]:
    """Layer → score of every channel, fp64."""
    from safetensors import safe_open

    weights: dict[str, Array] = {}
    wanted = {f"{m.name}.weight": m.name for m in card.modules if m.role in ("up", "down")}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:  # type: ignore[no-untyped-call]
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key in wanted:
                    weights[wanted[key]] = tensors.get_tensor(key).astype(np.float64)
    scores = {}
    for layer in range(card.layers):
        ups, downs = card.channels(layer)
        if ups and downs:
            inward = np.sqrt(sum(np.square(weights[m.name]).sum(axis=1) for m in ups))
            outward = np.sqrt(sum(np.square(weights[m.name]).sum(axis=0) for m in downs))
            scores[layer] = inward * outward
    return scores


def masks(card: ModelCard, scores: dict[int, Array], ratio: float) -> Masks:
    """Kept channels at a ratio, as sorted int32 indices per module side; nested over ratios."""
    found: Masks = {}
    if ratio <= 0:
        return found
    for layer, score in scores.items():
        order = np.argsort(-score, kind="stable")
        index = np.sort(order[: kept(len(score), ratio)]).astype(np.int32)
        ups, downs = card.channels(layer)
        found |= {f"{m.name}.out": index for m in ups} | {f"{m.name}.in": index for m in downs}
    return found
