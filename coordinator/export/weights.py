"""Weights of a whole model on their way out: read from the base's checkpoint, the adapter added, cut to
what is kept. Tensor by tensor.

Needs neither torch nor transformers; bf16, which NumPy does not have, travels as its 16 bits.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.contract.update import LowRank, Masks
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.peft_format import used_pairs
from rankfleet.profiles.card import Entry, ModelCard, entries, read_card
from rankfleet.profiles.memory import kept_groups

from ..planning import importance as channels
from ..store.versions import Version

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
OTHERS = {"I64": "<i8", "I32": "<i4", "U8": "u1", "I8": "i1", "BOOL": "?"}


class Place(msgspec.Struct, frozen=True):
    """A tensor of the base, and what is kept of its map's rows and columns."""

    name: str
    file: Path
    entry: Entry
    rows: Array | None = None
    columns: Array | None = None
    flipped: bool = False
    """Lies as (in, out)."""

    @property
    def shape(self) -> list[int]:
        """After the cut."""
        shape = list(self.entry.shape)
        if self.rows is not None:
            shape[-1 if self.flipped else 0] = len(self.rows)
        if self.columns is not None:
            shape[0 if self.flipped else 1] = len(self.columns)
        return shape


class Weights:
    """All tensors of a version over its base, at a pruning ratio (0: nothing is cut). Raises ConfigError
    for a ratio that is none.

    `even`: as many heads as divide the hidden size, the next such number above what the ratio says.
    """

    def __init__(
        self, version: Version, base: Path, ratio: float, scale: float, *, even: bool = False
    ) -> None:
        if not 0 <= ratio < 1:
            raise ConfigError(f"ratio {ratio} is not between 0 and 1")
        self.base, self.card, self.ratio, self.scale = base, read_card(base), ratio, scale
        self.pairs: dict[str, LowRank] = used_pairs(version.pairs)
        self.masks: Masks = {}
        self.groups = self.card.groups
        """Key-value heads that are kept."""
        if ratio:
            order, each = version.state.get("importance"), self.card.heads // self.card.groups
            counts = range(kept_groups(self.card.groups, ratio), self.card.groups + 1)
            self.groups = next(
                (n for n in counts if not even or self.card.hidden % (n * each) == 0), self.card.groups
            )
            scores = channels.restored(order) if order else channels.importance(base, self.card)
            self.masks = channels.masks(self.card, scores, ratio, self.groups)
        self.places = {p.name: p for p in self._found(base)}

    def _found(self, base: Path) -> Iterator[Place]:
        flipped = is_transposed(self.card)
        for file in sorted(base.glob("*.safetensors")):
            for name, entry in entries(file).items():
                if entry.dtype not in FLOATS | OTHERS:
                    raise ConfigError(
                        f"{file.name} holds weights as {entry.dtype}, which cannot be merged",
                        "export as peft instead",
                    )
                stem, _, kind = name.rpartition(".")
                rows, columns = self.masks.get(f"{stem}.out"), self.masks.get(f"{stem}.in")
                yield Place(
                    name,
                    file,
                    entry,
                    rows,
                    columns if kind == "weight" else None,
                    flipped and kind == "weight",
                )

    def stored(self, place: Place) -> Array:
        """A tensor in the checkpoint's own dtype, merged and cut."""
        made = read(place.file, place.entry)
        stem, _, kind = place.name.rpartition(".")
        if kind == "weight" and (pair := self.pairs.get(stem)) is not None:
            change = self.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))
            made = narrow(
                wide(made, place.entry.dtype) + (change.T if place.flipped else change), place.entry.dtype
            )
        if place.rows is not None:
            made = made[:, place.rows] if place.flipped else made[place.rows]
        if place.columns is not None:
            made = made[place.columns] if place.flipped else made[:, place.columns]
        return np.ascontiguousarray(made)

    def floats(self, name: str) -> Array:
        """The same as fp32, (out, in) for a map. Raises KeyError."""
        place = self.places[name]
        made: Array = wide(self.stored(place), place.entry.dtype).astype(np.float32)
        return np.ascontiguousarray(made.T) if place.flipped and made.ndim == 2 else made


def is_transposed(card: ModelCard) -> bool:
    """Does this family keep its linear maps as (in, out)? GPT-2 does."""
    return card.family == "gpt2"


def read(file: Path, entry: Entry) -> Array:
    """A tensor as it lies in the file, mapped."""
    return np.memmap(
        file, dtype=(FLOATS | OTHERS)[entry.dtype], mode="r", offset=entry.offset, shape=tuple(entry.shape)
    )


def wide(stored: Array, dtype: str) -> Array:
    """As fp64."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64)


def narrow(values: Array, dtype: str) -> Array:
    """Back to a checkpoint's dtype."""
    return to_bf16(values.astype(np.float32)) if dtype == "BF16" else values.astype(FLOATS[dtype])


def to_bf16(values: Array) -> Array:
    """fp32 rounded to the nearest bf16 (ties to even), as u16 bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
