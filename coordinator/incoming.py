"""A stored update, lifted: from the file that a device sent to an `Update` in canonical coordinates."""

from pathlib import Path

import msgspec
import numpy as np

from federated.errors import NotFinite, WireError
from federated.messages import Assignment
from federated.spec import Spec
from federated.stack import ServerSide
from federated.tensors import Tensors
from federated.update import Update
from federated.wire import decode, open_frame

from .blobs import Blobs


def check(data: bytes) -> dict[str, object]:
    """What can be seen without decoding: a sound frame with finite numbers. Returns the device's report. Raises WireError."""
    _, meta = decode(data, finite=True)
    if not isinstance(meta, dict):
        raise WireError("the update carries no report")
    return meta


def lift(
    path: Path, assignment: Assignment, device: str, server: ServerSide, blobs: Blobs, age: int, weight: float | None = None
) -> Update:
    """Read, undo the codecs, check shapes and numbers. Raises WireError; the caller puts the update aside with the reason."""
    tensors, report = open_frame(path, finite=True)
    view_frame, meta = open_frame(blobs.path(assignment.blobs["view"].digest))
    spec = msgspec.convert(meta, Spec)
    view = {k: t.astype(np.float32) for k, t in view_frame.items() if not k.startswith("x/")}
    masks = (
        {k: np.array(t) for k, t in open_frame(blobs.path(assignment.blobs["masks"].digest))[0].items()}
        if "masks" in assignment.blobs
        else {}
    )
    extra: dict[str, Tensors] = {}
    for key, array in tensors.items():
        if key.startswith("x/") and key.count("/") >= 2:
            _, method, name = key.split("/", 2)
            extra.setdefault(method, {})[name] = np.array(array)
    examples = float(report.get("examples", 1) or 1)
    update = Update(
        device,
        weight if weight is not None else min(max(examples, 1.0), 1e7),
        {k[2:]: t for k, t in tensors.items() if k.startswith("d/")},
        spec,
        view,
        masks,
        extra,
        report,
        age,
        1.0,
        server.stack.space,
        assignment.blobs["view"].digest,
    )
    try:
        update = server.receive(update, assignment.round)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WireError(f"the update cannot be decoded: {error}") from None
    shapes = spec.shapes()
    for name, delta in update.delta.items():
        if name not in shapes or delta.shape != shapes[name]:
            raise WireError(f"the update holds `{name}` with shape {delta.shape}, expected {shapes.get(name)}")
        if not np.isfinite(delta).all():
            raise NotFinite(f"the update holds NaN or infinity in `{name}`")
    return update
