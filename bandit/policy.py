"""What a policy is: it picks one of the arms that each device can hold, and learns from what came of it.

A policy is a value; everything that it learns lies in `state`, a JSON dictionary, so that a tuner can be
saved, restarted and replayed: the same state, fleet and seed give the same arms.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .arms import Arm

State = dict[str, Any]


class Priced(msgspec.Struct, frozen=True):
    """An arm that a device can hold, with what it is expected to cost and to be worth."""

    arm: Arm
    rank: int
    depth: int
    seconds: float
    memory_mb: float
    utility: float
    """Prior worth of one round, on a scale of its own (docs/specification.md)."""


class Member(msgspec.Struct, frozen=True):
    """A device of this round. `arms` holds feasible arms only, never padded."""

    device: str
    kind: str
    share: float
    arms: list[Priced]
    current: Arm | None = None


class Choice(msgspec.Struct, frozen=True):
    """An arm and, in one sentence, why."""

    arm: Arm
    why: str


class Outcome(msgspec.Struct, frozen=True):
    """What came of an arm: loss on fixed probe batches before and after, seconds, share of the round's
    update norm.

    A device whose stack has a release tells no loss: both are None, and `unknown` is true.
    """

    device: str
    kind: str
    arm: Arm
    loss_before: float | None
    loss_after: float | None
    seconds: float
    norm_share: float = 0.0
    failed: str = ""
    looks: Mapping[str, Mapping[str, Any]] = {}
    """What methods looked at on the device and sent beside the update: method → name → array."""

    @property
    def drop(self) -> float | None:
        """Loss before minus after; None where it was not told."""
        return (
            None
            if self.loss_before is None or self.loss_after is None
            else self.loss_before - self.loss_after
        )

    @property
    def unknown(self) -> bool:
        """Did the arm work, and is it not known what it brought? Nothing is to be learnt of its worth
        then, neither good nor bad."""
        return not self.failed and self.drop is None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class: settings are fields, learning lies in `state`."""

    def choose(
        self, members: Sequence[Member], state: State, round: int, rng: random.Random
    ) -> dict[str, Choice]:
        """One arm for every member."""
        raise NotImplementedError

    def observe(self, outcomes: Sequence[Outcome], state: State) -> None:
        """Learn from a finished round."""
        raise NotImplementedError
