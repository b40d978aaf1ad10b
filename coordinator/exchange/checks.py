"""What is looked at while an update is at the door, without decoding it."""

import itertools
import math
from collections.abc import Mapping

from rankfleet.federated.errors import WireError
from rankfleet.federated.wire.frame import decode
from rankfleet.federated.wire.messages import read_assignment


def check(data: bytes) -> dict[str, object]:
    """What can be seen without decoding: a sound frame with finite numbers. Returns the device's report.
    Raises WireError."""
    _, meta = decode(data, finite=True)
    if not isinstance(meta, dict):
        raise WireError("the update carries no report")
    return meta


def bounded(cost: Mapping[str, float]) -> dict[str, float]:
    """What a device says that its round took: a few finite numbers, whatever it sends."""
    return {
        k[:32]: round(min(v, 1e9), 3)
        for k, v in itertools.islice(cost.items(), 16)
        if math.isfinite(v) and v >= 0
    }


def purpose(body: bytes) -> str:
    """What an assignment in the ledger was for."""
    return read_assignment(body).purpose
