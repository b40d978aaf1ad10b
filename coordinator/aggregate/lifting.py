"""A stored update, lifted: from the file that a device sent to an `Update` in canonical coordinates.

Updates stay on disk. What one decodes to is kept as long as there is room, and decoded again where there is not, so that closing
a round with a thousand devices takes no more memory than with twenty.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.stack import ServerSide
from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.contract.update import Masks, Update
from rankfleet.federated.errors import NotFinite, WireError
from rankfleet.federated.wire.frame import decode, open_frame
from rankfleet.federated.wire.messages import Assignment, read_assignment

from ..exchange.downloads import Blobs

IMPORTANCE = "\0importance"
"""Where an update's scores of heads and channels lie among its extras: no method has this name."""
PINNED_MB, RECENT_MB = 20, 28
"""Decoded updates that are kept for every pass, and those that were looked at last."""


def check(data: bytes) -> dict[str, object]:
    """What can be seen without decoding: a sound frame with finite numbers. Returns the device's report. Raises WireError."""
    _, meta = decode(data, finite=True)
    if not isinstance(meta, dict):
        raise WireError("the update carries no report")
    return meta


def bounded(cost: Mapping[str, float]) -> dict[str, float]:
    """What a device says that its round took: a few finite numbers, whatever it sends."""
    return {k[:32]: round(min(v, 1e9), 3) for k, v in itertools.islice(cost.items(), 16) if math.isfinite(v) and v >= 0}


def purpose(body: bytes) -> str:
    """What an assignment in the ledger was for."""
    return read_assignment(body).purpose


class Keeper:
    """Decoded updates: the first ones stay, of the others the last ones, so that passes in the same order profit."""

    def __init__(self, pinned_mb: float = PINNED_MB, recent_mb: float = RECENT_MB) -> None:
        self.keys = itertools.count()
        self.pinned: dict[int, Tensors] = {}
        self.recent: OrderedDict[int, Tensors] = OrderedDict()
        self._free, self._room = pinned_mb * 1e6, recent_mb * 1e6
        self._held = 0

    def get(self, key: int, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, from memory where it is."""
        if (held := self.pinned.get(key) or self.recent.get(key)) is not None:
            return held
        made = make()
        size = sum(t.nbytes for t in made.values())
        if size <= self._free:
            self._free -= size
            self.pinned[key] = made
            return made
        self.recent[key] = made
        self._held += size
        while self._held > self._room and len(self.recent) > 1:
            _, old = self.recent.popitem(last=False)
            self._held -= sum(t.nbytes for t in old.values())
        return made


class Decoded(Mapping[str, Array]):
    """The deltas of one stored update."""

    def __init__(self, keeper: Keeper, make: Callable[[], Tensors]) -> None:
        self._keeper, self._make, self._key = keeper, make, next(keeper.keys)

    def load(self) -> Tensors:
        """All of them. Raises WireError."""
        return self._keeper.get(self._key, self._make)

    def __getitem__(self, name: str) -> Array:
        return self.load()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __len__(self) -> int:
        return len(self.load())


class Lifter:
    """Lifts the updates of one round: views and masks, which devices share, are opened once."""

    def __init__(self, server: ServerSide, blobs: Blobs, number: int, keeper: Keeper) -> None:
        self.server, self.blobs, self.number, self.keeper = server, blobs, number, keeper
        self._views: dict[str, tuple[Spec, Tensors]] = {}
        self._masks: dict[str, Masks] = {}

    def view(self, digest: str) -> tuple[Spec, Tensors]:
        """Spec and (B₀, A₀) of a view that was sent."""
        if digest not in self._views:
            frame, meta = open_frame(self.blobs.path(digest))
            self._views[digest] = (
                msgspec.convert(meta, Spec),
                {k: t.astype(np.float32) for k, t in frame.items() if not k.startswith("x/")},
            )
        return self._views[digest]

    def masks(self, digest: str) -> Masks:
        """Kept channels that were sent."""
        if digest not in self._masks:
            self._masks[digest] = {k: np.array(t) for k, t in open_frame(self.blobs.path(digest))[0].items()}
        return self._masks[digest]

    def lift(self, path: Path, assignment: Assignment, device: str, weight: float | None = None) -> Update:
        """Read, undo the codecs, check shapes and numbers. Raises WireError; the caller puts the update aside with the reason."""
        tensors, report = decode(path.read_bytes())
        spec, view = self.view(assignment.blobs["view"].digest)
        extra: dict[str, Tensors] = {}
        for key, array in tensors.items():
            if key.startswith("x/") and key.count("/") >= 2:
                _, method, name = key.split("/", 2)
                extra.setdefault(method, {})[name] = np.array(array)
        extra[IMPORTANCE] = {k: np.array(t) for k, t in tensors.items() if k.startswith("p/")}
        examples = float(report.get("examples", 1) or 1)
        raw = Update(
            device,
            weight if weight is not None else min(max(examples, 1.0), 1e7),
            {},
            spec,
            view,
            self.masks(assignment.blobs["masks"].digest) if "masks" in assignment.blobs else {},
            extra,
            report,
            self.number - assignment.round,
            1.0,
            self.server.stack.space,
            assignment.blobs["view"].digest,
        )
        delta = Decoded(self.keeper, lambda: self._decoded(path, raw, assignment.round))
        delta.load()
        return replace(raw, delta=delta)

    def _decoded(self, path: Path, raw: Update, number: int) -> Tensors:
        tensors, _ = decode(path.read_bytes())
        sent = replace(raw, delta={k[2:]: t for k, t in tensors.items() if k.startswith("d/")})
        try:
            found = dict(self.server.receive(sent, number).delta)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise WireError(f"the update cannot be decoded: {error}") from None
        shapes = raw.spec.shapes()
        for name, delta in found.items():
            if name not in shapes or delta.shape != shapes[name]:
                raise WireError(f"the update holds `{name}` with shape {delta.shape}, expected {shapes.get(name)}")
            if not np.isfinite(delta).all():
                raise NotFinite(f"the update holds NaN or infinity in `{name}`")
        return found
