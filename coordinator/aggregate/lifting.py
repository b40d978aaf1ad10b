"""A stored update, lifted: from the file that a device sent to an `Update` in canonical coordinates.

Updates stay on disk. What one decodes to is kept as long as there is room, and decoded again where there
is not, so that closing a round with a thousand devices takes no more memory than with twenty.
"""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from rankfleet.federated.contract.server_side import ServerSide
from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import Masks, Update
from rankfleet.federated.errors import NotFinite, WireError
from rankfleet.federated.wire.frame import decode, open_frame
from rankfleet.federated.wire.messages import Assignment

from ..exchange.downloads import Blobs
from .kept import Decoded, Keeper

IMPORTANCE = "\0importance"
"""Where an update's scores of heads and channels lie among its extras: no method has this name."""


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
                {
                    k: t.astype(np.float32) if t.dtype.kind == "f" else t
                    for k, t in frame.items()
                    if not k.startswith("x/")
                },
            )
        return self._views[digest]

    def masks(self, digest: str) -> Masks:
        """Kept channels that were sent."""
        if digest not in self._masks:
            self._masks[digest] = {k: np.array(t) for k, t in open_frame(self.blobs.path(digest))[0].items()}
        return self._masks[digest]

    def lift(self, path: Path, assignment: Assignment, device: str, weight: float | None = None) -> Update:
        """Read, undo the codecs, check shapes and numbers. Raises WireError; the caller puts the update
        aside with the reason."""
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
        return replace(raw, sent=delta)

    def _decoded(self, path: Path, raw: Update, number: int) -> Tensors:
        tensors, _ = decode(path.read_bytes())
        sent = replace(raw, sent={k[2:]: t for k, t in tensors.items() if k.startswith("d/")})
        try:
            found = dict(self.server.receive(sent, number).delta)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise WireError(f"the update cannot be decoded: {error}") from None
        shapes = raw.spec.shapes()
        for name, delta in found.items():
            if name not in shapes or delta.shape != shapes[name]:
                raise WireError(
                    f"the update holds `{name}` with shape {delta.shape}, expected {shapes.get(name)}"
                )
            if not np.isfinite(delta).all():
                raise NotFinite(f"the update holds NaN or infinity in `{name}`")
        return found
