"""A round of training that was cut off goes on where it was: parameters, moments, methods' state and
random numbers, bit for bit.

Written every minute and when the worker is told to leave, beside the round's result; gone when the round
is finished.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankfleet.federated.contract.client_side import ClientSide
from rankfleet.federated.contract.contexts import StepContext
from rankfleet.federated.errors import RankfleetError, WireError
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.wire.frame import freeze, thaw

log = logging.getLogger(__name__)
EVERY_S = 60.0


class Halted(Exception):
    """The worker was told to leave; what was done is on disk."""


class Checkpoint:
    """One round's, for `assignment` (a digest: another assignment begins anew). `halted` says whether to
    leave at the next step."""

    def __init__(self, path: Path, assignment: str, halted: Any) -> None:
        self.path, self.assignment, self.halted = path, assignment, halted
        self._saved = time.monotonic()

    def restore(
        self, values: Tensor, moments: dict[str, Tensor], client: ClientSide, contexts: dict[str, StepContext]
    ) -> int:
        """Steps that are done already; 0 where there is nothing, or nothing that fits."""
        try:
            kept: dict[str, Any] = thaw(self.path.read_bytes())
            if kept["assignment"] != self.assignment or kept["values"].shape != tuple(values.shape):
                return 0
            if set(kept["moments"]) != set(moments):
                return 0
        except (OSError, WireError, KeyError, TypeError, AttributeError):
            return 0
        with torch.no_grad():
            values.copy_(torch.from_numpy(np.array(kept["values"])))
            for name, moment in moments.items():
                moment.copy_(torch.from_numpy(np.array(kept["moments"][name])))
        for name, own in kept["methods"].items():
            for mine, theirs in ((client.state[name], own["state"]), (client.up[name], own["up"])):
                mine.clear()
                mine.update(theirs)
            contexts[name].generator.set_state(torch.from_numpy(np.array(own["random"])))
        return int(kept["step"])

    def after(
        self,
        step: int,
        values: Tensor,
        moments: dict[str, Tensor],
        client: ClientSide,
        contexts: dict[str, StepContext],
    ) -> None:
        """A step is done. Raises Halted when it was the last for now."""
        halted = self.halted()
        if halted or time.monotonic() - self._saved > EVERY_S:
            self._saved = time.monotonic()
            methods = {
                n: {"state": client.state[n], "up": client.up[n], "random": c.generator.get_state().numpy()}
                for n, c in contexts.items()
            }
            told = {
                "assignment": self.assignment, "step": step, "values": values.detach().cpu().numpy(),
                "methods": methods,
                "moments": {k: t.cpu().numpy() for k, t in moments.items()},
            }  # fmt: skip
            try:
                write_atomic(self.path, freeze(told))
            except (OSError, TypeError, ValueError, RankfleetError) as error:
                log.warning(
                    "no checkpoint after step %d: %s", step, error
                )  # the round would begin anew, nothing else
        if halted:
            raise Halted(f"stopped after step {step}")

    def done(self) -> None:
        """The round is finished."""
        self.path.unlink(missing_ok=True)
