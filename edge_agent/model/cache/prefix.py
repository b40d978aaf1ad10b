"""The frozen layers below a boundary: where to cut, what names their output, how it is made once, in
groups that are always the same."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.update import Masks

from ..ops.adapted import Site
from ..ops.layout import Layout
from ..transformer import Transformer
from .activations import FORMAT, Activations, example_key

GROUP = 16
"""Examples whose states are made together."""
WORTH = 2.0
"""Uses of an example, while its states are valid, from which on keeping them pays."""


def trained_from(sites: Mapping[str, Site], layers: int) -> int:
    """The lowest layer with a trained pair."""
    return min(
        (s.layer for s in sites.values() if any(a.requires_grad or b.requires_grad for a, b, _ in s.pairs())),
        default=layers,
    )


def choose(own: int, common: int, draws: int, examples: int, keeps: int, rounds: int) -> tuple[int, str]:
    """Where to cut, or 0 and why not.

    `own` is the lowest layer that is trained here, `common` the lowest that anybody adapts: below it
    nothing changes in the job's `rounds`; between the two, frozen adapters stay as they are for `keeps`
    more. `draws` examples are used in a round. Own boundary where that pays, else the common one (core.md
    8.9, P2 and P1). All rounds count, not those that are left: what was made is used to the end, and
    whether a restart lost it must not show in the result. States are made when they are first asked for,
    so a late start costs little.
    """
    uses = draws / max(1, examples)
    if own == 0:
        return 0, "the lowest layer is trained"
    if uses * (rounds if own == common else keeps) >= WORTH:
        return own, ""
    if common > 0 and uses * rounds >= WORTH:
        return common, ""
    return (
        0,
        f"an example is used {uses * (rounds if common > 0 else keeps):.1f} times before its states are out "
        "of date",
    )


def prefix_id(
    sites: Mapping[str, Site], below: int, digest: str, bits: int, dtype: torch.dtype, masks: Masks
) -> str:
    """Name of what layers under `below` compute: model, bits, dtype, kept channels, frozen pairs and
    carries there, code."""
    whole = hashlib.sha256(f"{FORMAT} {digest} {bits} {dtype} {below} {torch.__version__}".encode())
    for name, site in sorted(sites.items()):
        if site.layer >= below:
            continue
        for side in ("out", "in"):
            if (kept := masks.get(f"{name}.{side}")) is not None:
                whole.update(f"{name}.{side}".encode() + kept.astype("<i8").tobytes())
        for a, b, scale in site.pairs():
            whole.update(f"{name} {scale} {tuple(a.shape)} {tuple(b.shape)}".encode())
            whole.update(a.detach().cpu().numpy().tobytes() + b.detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:32]


class Prefix:
    """Hidden states that enter layer `at`. Where the store of an earlier, lower boundary has them, they
    are made from there.

    An example's states are always made in the same company, so that they do not depend on what was kept: a
    restart changes no bit.
    """

    def __init__(
        self,
        core: Transformer,
        at: int,
        store: Activations,
        examples: Sequence[Sequence[int]],
        lower: "Prefix | None",
    ) -> None:
        self.core, self.at, self.store, self.lower = core, at, store, lower
        known = {example_key(ids): list(ids) for ids in examples}
        ordered = sorted(known, key=lambda k: (len(known[k]), k))
        self._groups = [ordered[n : n + GROUP] for n in range(0, len(ordered), GROUP)]
        self._group_of = {k: n for n, group in enumerate(self._groups) for k in group}
        self._ids = known

    @torch.no_grad()
    def states(self, batch: dict[str, Any], layout: Layout) -> Tensor:
        """Rows (layout.size, hidden) fp32, exact to fp16."""
        return layout.join([self._of(k) for k in batch["key"].tolist()]).float()

    def _of(self, key: int) -> Tensor:
        found = self.store.get(key)
        if found is not None:
            return found
        keys = self._groups[self._group_of[key]]
        counts = torch.tensor([len(self._ids[k]) for k in keys])
        layout = Layout.of(counts, self.core.device)
        rows = self._made(keys, layout).cpu()
        made = dict(zip(keys, torch.split(rows[: layout.real], counts.tolist()), strict=True))
        for k, r in made.items():
            self.store.put(k, r)
        return made[key]

    def _made(self, keys: list[int], layout: Layout) -> Tensor:
        if self.lower is not None:
            x = self.lower.states({"key": torch.tensor(keys)}, layout)
            return _half(self.core.run(x, layout, self.lower.at, self.at))
        ids = torch.zeros(layout.batch, layout.length, dtype=torch.long)
        for row, key in enumerate(keys):
            ids[row, : len(self._ids[key])] = torch.tensor(self._ids[key])
        return _half(self.core.run(self.core.embed(ids, layout), layout, 0, self.at))

    def of(self, examples: Sequence[Sequence[int]]) -> bool:
        """Are these the examples that it was made for?"""
        return {example_key(ids) for ids in examples} == self._ids.keys()

    @property
    def complete(self) -> bool:
        """Is everything kept that can be asked for?"""
        return len(self.store) >= len(self._ids)

    def bytes_needed(self) -> int:
        """Room for all examples."""
        return sum(map(len, self._ids.values())) * self.core.kind.hidden * 2


def _half(x: Tensor) -> Tensor:
    """fp16, inside its range: a few outlier channels of large models would leave it."""
    small: Tensor = x.clamp(-65504.0, 65504.0).half()
    return small
