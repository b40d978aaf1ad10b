"""What arrived from the coordinator for a round, as arrays."""

from pathlib import Path

import msgspec
import numpy as np
import torch

from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import NotFinite, WireError
from rankfleet.federated.wire.frame import open_frame


class View:
    """What arrived from the coordinator for one round: spec, tensors, carry, masks, and extras of methods."""

    def __init__(self, blobs: dict[str, str]) -> None:
        tensors, meta = open_frame(Path(blobs["view"]))
        spec = msgspec.convert(meta, Spec)
        frozen, below = open_frame(Path(blobs["frozen"])) if "frozen" in blobs else ({}, None)
        pairs = {**spec.pairs, **(msgspec.convert(below, Spec).pairs if below else {})}
        self.spec = Spec(pairs, spec.dense)
        constants = open_frame(Path(blobs["constants"]))[0] if "constants" in blobs else {}
        tensors = {**constants, **tensors}
        self.carry = _carried(open_frame(Path(blobs["carry"]))[0]) if "carry" in blobs else {}
        """What all devices apply frozen, by map, in canonical coordinates, scale and all."""
        self.masks = (
            {k: np.array(t) for k, t in open_frame(Path(blobs["masks"]))[0].items()}
            if "masks" in blobs
            else {}
        )
        self.down: dict[str, Tensors] = {}
        self.tensors: Tensors = {}
        own: Tensors = {}
        for name, array in {**frozen, **tensors}.items():
            if name.startswith("x/"):
                _, method, key = name.split("/", 2)
                self.down.setdefault(method, {})[key] = np.array(array)
            else:
                own[name] = array
        self.tensors = widened(own)

    def carried(self) -> dict[str, LowRank]:
        """The carry on the channels that this device keeps."""
        out, in_ = (
            {m: self.masks.get(f"{m}.{side}", slice(None)) for m in self.carry} for side in ("out", "in")
        )
        return {m: LowRank(p.B[out[m]], p.A[:, in_[m]]) for m, p in self.carry.items()}

    def trained(self) -> Tensors:
        """The part of the view that is trained here."""
        return {k: self.tensors[k] for k in self.spec.shapes()}


def _carried(tensors: Tensors) -> dict[str, LowRank]:
    """Pairs by map, fp32. Raises WireError for half a pair, NotFinite."""
    wide = widened({k: np.asarray(t) for k, t in tensors.items()})
    modules = sorted({k.rpartition(".carry.")[0] for k in wide})
    if odd := [m for m in modules if not {f"{m}.carry.A", f"{m}.carry.B"} <= wide.keys()]:
        raise WireError(f"the carry of `{odd[0]}` is half a pair")
    return {m: LowRank(wide[f"{m}.carry.B"], wide[f"{m}.carry.A"]) for m in modules}


def widened(tensors: Tensors) -> Tensors:
    """The same arrays as fp32, checked. In one piece: torch widens fp16 twenty times as fast as NumPy.
    Raises NotFinite."""
    if not tensors:
        return {}
    kinds = {t.dtype for t in tensors.values()}
    whole = np.concatenate(
        [t.reshape(-1) if len(kinds) == 1 else t.reshape(-1).astype(np.float32) for t in tensors.values()]
    )
    flat: Array = torch.from_numpy(whole).float().numpy()
    found, at = {}, 0
    for name, t in tensors.items():
        found[name] = flat[at : at + t.size].reshape(t.shape)
        at += t.size
    if not np.isfinite(flat).all():
        bad = next(k for k, t in found.items() if not np.isfinite(t).all())
        raise NotFinite(f"tensor `{bad}` of the adapter holds NaN or infinity")
    return found
