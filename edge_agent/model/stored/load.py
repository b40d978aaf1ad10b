"""From a checkpoint to a running base: layer by layer, each map cut, packed and put in its place before
the next is touched.

Peak memory is the final size and one map: tensors are mapped, and an fp32 checkpoint that is used as it
is, is never copied.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rankfleet.federated.contract.update import Masks
from rankfleet.profiles.architecture import Architecture

from ..ops.adapted import Site
from ..ops.frozen import Frozen
from ..transformer import Layer, Norm, Transformer
from .safetensors import Checkpoint, cut
from .words import Words

Packed = dict[str, Tensor]
"""A layer's tensors by `<map>/<kind>` and `<norm>/weight`, as they are kept and as they lie on disk."""
NORMS = ("norm1", "norm2", "q_norm", "k_norm")


class Recipe:
    """What is made of a checkpoint: bits of the maps, kept rows and columns."""

    def __init__(self, source: Checkpoint, kind: Architecture, bits: int, masks: Masks, head: bool) -> None:
        self.source, self.kind, self.bits, self.masks, self.head = source, kind, bits, masks, head
        self.prefix = source.prefix(f"{kind.names.word}.weight")

    def name(self, part: str, layer: int = 0) -> str:
        """The checkpoint's name of a part, such as `q`."""
        pattern: str = getattr(self.kind.names, part)
        return self.prefix + pattern.format(l=layer) if pattern else ""

    def maps(self) -> list[list[str]]:
        """Parts of a layer that are maps, those with a common input together."""
        names = self.kind.names
        return [
            ["q"] if names.q == names.k else ["q", "k", "v"],
            ["o"],
            [*(["gate"] if names.gate else []), "up"],
            ["down"],
        ]

    def layer(self, number: int) -> Packed:
        """One layer, cut and packed."""
        found: Packed = {}
        for part in (p for group in self.maps() for p in group):
            name = self.name(part, number)
            weight, bias = self.source.get(f"{name}.weight"), None
            if f"{name}.bias" in self.source:
                bias = self.source.get(f"{name}.bias").float()
            weight = weight.t() if self.kind.transposed else weight
            weight, bias = cut(weight, bias, self.masks.get(f"{name}.out"), self.masks.get(f"{name}.in"))
            found |= {f"{part}/{k}": t for k, t in Frozen.pack(weight, self.bits).items()}
            found[f"{part}/shape"] = torch.tensor(weight.shape)
            if bias is not None:
                found[f"{part}/bias"] = bias
        for part in NORMS:
            found |= _norm(part, self.source.norm(self.name(part, number), self.kind.norm_plus))
        return found

    def rest(self) -> Packed:
        """Embeddings, the last norm, the output table. Tables stay as they are, mapped; in 16 bits as the
        output of a quantised base."""
        found: Packed = {}
        for part in ("word", "position", "kind", "first"):
            if name := self.name(part):
                found[part] = self.source.get(
                    name if self.kind.patch and part != "word" else f"{name}.weight", apart=part == "word"
                )
        if self.kind.patch:
            found["word_bias"] = self.source.get(f"{self.name('word')}.bias").float()
        found["position"] = found["position"].float() if "position" in found else torch.empty(0)
        if self.head:
            table = "lm_head.weight"
            if table in self.source:
                found["head"] = self.source.get(table)
            if "lm_head.bias" in self.source:
                found["head_bias"] = self.source.get("lm_head.bias").float()
            if self.bits < 32:
                found |= {k: _half(found[k]) for k in ("word", "head") if k in found}
        for part in ("norm0", "final"):
            found |= _norm(part, self.source.norm(self.name(part), self.kind.norm_plus))
        return {k: t for k, t in found.items() if t.numel()}


def _norm(part: str, norm: Norm | None) -> Packed:
    if norm is None:
        return {}
    return {f"{part}/weight": norm[0]} | ({} if norm[1] is None else {f"{part}/bias": norm[1]})


def _half(table: Tensor) -> Tensor:
    return table if table.dtype in (torch.float16, torch.bfloat16) else table.half()


def assemble(
    recipe: Recipe,
    layers: list[Callable[[], Packed]],
    rest: Callable[[], Packed],
    sites: dict[str, Site],
    device: torch.device,
) -> Transformer:
    """The model from packed layers, each on `device` as soon as it is read; `sites` gets every map by its
    checkpoint name."""
    kept: tuple[str, ...] = ("word", "word_bias", "first", "position", "kind", "head", "head_bias")

    def tables() -> dict[str, Tensor]:
        found = moved(rest(), device)
        return {k: found[k] if k in ("word", "head") else found[k].float() for k in kept if k in found}

    sparse = (
        not recipe.kind.patch
        and device.type == "cpu"
        and (not recipe.head or (recipe.bits == 32 and "head" in rest()))
    )
    words = Words(lambda: rest()["word"]) if sparse else None
    sources = [partial(_made, recipe, n, give, sites, device) for n, give in enumerate(layers)]
    norms = {k: t for k, t in rest().items() if k.split("/")[0] in ("norm0", "final")}
    return Transformer(recipe.kind, tables, sources, _norms(moved(norms, device), ("norm0", "final")), words)


def moved(packed: Packed, device: torch.device) -> Packed:
    """On the device; shapes stay where Python reads them."""
    return (
        packed
        if device.type == "cpu"
        else {k: t if k.endswith("/shape") else t.to(device) for k, t in packed.items()}
    )


def _made(
    recipe: Recipe, number: int, give: Callable[[], Packed], sites: dict[str, Site], device: torch.device
) -> Layer:
    return _layer(recipe, number, moved(give(), device), sites)


def _norms(packed: Packed, parts: tuple[str, ...]) -> dict[str, Norm]:
    return {
        p: (packed[f"{p}/weight"].float(), packed.get(f"{p}/bias")) for p in parts if f"{p}/weight" in packed
    }


def _layer(recipe: Recipe, number: int, packed: Packed, sites: dict[str, Site]) -> Layer:
    groups = []
    for group in recipe.maps():
        here = []
        for part in group:
            own = {k.removeprefix(f"{part}/"): t for k, t in packed.items() if k.startswith(f"{part}/")}
            out, in_ = own.pop("shape").tolist()
            base = Frozen(out, in_, {k: t for k, t in own.items() if k != "bias"}, own.get("bias"))
            name = recipe.name(part, number)
            site = sites[name] = sites.get(name) or Site(name, number, base)
            site.base = base
            here.append(site)
        groups.append(here)
    return Layer(groups[0], groups[1][0], groups[2], groups[3][0], _norms(packed, NORMS))
