"""The tuner: keeps the time model in step with what was measured, prices arms, and lets a policy choose.

What is not a policy's business lives here: bits are chosen once, when a device joins, and change only
after a memory failure; pruning only grows, at most every fifth round; a device that ran out of memory gets
a larger correction.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from rankfleet.profiles.card import ModelCard, Module
from rankfleet.profiles.cost import price
from rankfleet.profiles.device import DeviceProfile
from rankfleet.profiles.kernels import times
from rankfleet.profiles.memory import StepPlan, adapter_parameters, memory_mb, step_plan

from .arms import Arm, ArmSpace, expand, rank_and_depth
from .policy import Choice, Member, Outcome, Policy, Priced, State

PRUNE_EVERY = 5


class NoArm(ValueError):
    """No arm of the job fits a device; the message says what the smallest one needs."""


class Tuner:
    """One per job. `state` is JSON: save it, and the same choices follow."""

    def __init__(
        self,
        policy: Policy,
        card: ModelCard,
        modules: list[Module],
        space: ArmSpace,
        *,
        max_depth: int,
        length: int,
        head: int,
        wire_bits: Callable[[float], float],
        seed: int,
        state: State | None = None,
    ) -> None:
        self.policy, self.card, self.space, self.seed = policy, card, space, seed
        self.length, self.head, self.wire_bits, self.max_depth = length, head, wire_bits, max_depth
        self.state: State = state or {"devices": {}, "policy": {}}
        self.placements = {rule: expand(rule, card, modules) for rule in space.rules(max_depth)}
        self._plans: dict[tuple[Any, ...], StepPlan] = {}

    def join(self, device: str, profile: DeviceProfile, bits_ms: dict[str, float]) -> int:
        """Fix a device's bits: the fastest measured ones among those that fit. Raises NoArm."""
        if device not in self.state["devices"]:
            bits = self._bits(device, profile, bits_ms)
            self.state["devices"][device] = {
                "speed": 1.0,
                "memory": 1.0,
                "prune": 0.0,
                "pruned_at": 0,
                "bits": bits,
            }
        return int(self.state["devices"][device]["bits"])

    def _bits(self, device: str, profile: DeviceProfile, bits_ms: dict[str, float], below: int = 99) -> int:
        fitting = [
            b for b in self.space.precisions if b < below and self._smallest(device, b) <= profile.budget_mb
        ]
        if not fitting:
            need = min(self._smallest(device, b) for b in self.space.precisions)
            raise NoArm(
                f"{device} allows {profile.budget_mb:.0f} MB for the model, the smallest arm needs "
                f"{need:.0f} MB"
            )
        measured = times(bits_ms, self.card.hidden)
        guess = {b: 1 / (profile.gflops.get(str(b)) or min(profile.gflops.values())) for b in fitting}
        return min(fitting, key=lambda b: (measured.get(b, guess[b] * 1e3), -b))

    def _smallest(self, device: str, bits: int) -> float:
        correction = self.state["devices"].get(device, {}).get("memory", 1.0)
        return float(
            correction
            * min(
                memory_mb(self.card, p, max(self.space.prune), bits, self.space.batch, self.length, self.head)
                for p in self.placements.values()
            )
        )

    def _how(self, arm: Arm, budget_mb: float) -> StepPlan:
        """How an arm's batch fits; the same for all devices with this budget, and asked for often."""
        key = (arm.placement, arm.prune, arm.bits, arm.batch, budget_mb)
        if key not in self._plans:
            placement = self.placements[arm.placement]
            self._plans[key] = step_plan(
                self.card, placement, arm.prune, arm.bits, arm.batch, self.length, self.head, budget_mb
            )
        return self._plans[key]

    def feasible(self, device: str, profile: DeviceProfile, round: int) -> list[Priced]:
        """Arms that the device can hold now, priced. Raises NoArm."""
        own = self.state["devices"][device]
        may_prune = round > 0 and round - own["pruned_at"] >= PRUNE_EVERY
        found = []
        for arm in self.space.arms(self.max_depth):
            grows = arm.prune > own["prune"] + 1e-9
            if (
                arm.bits != own["bits"]
                or arm.prune < own["prune"] - 1e-9
                or (grows and not may_prune and not own.get("tight"))
            ):
                continue
            placement = self.placements[arm.placement]
            cost = price(
                self.card,
                profile,
                placement,
                prune=arm.prune,
                bits=arm.bits,
                batch=arm.batch,
                steps=arm.steps,
                length=self.length,
                head=self.head,
                wire_bits=self.wire_bits,
                correction=own["speed"],
                how=self._how(arm, profile.budget_mb / own["memory"]),
            )
            if cost.memory_mb * own["memory"] <= profile.budget_mb:
                rank, depth = rank_and_depth(placement, self.card)
                found.append(
                    Priced(arm, rank, depth, cost.seconds, cost.memory_mb * own["memory"], self._utility(arm))
                )
        if not found and not own.get("tight"):
            own["tight"] = True
            return self.feasible(device, profile, round)
        if not found:
            raise NoArm(f"{device} allows {profile.budget_mb:.0f} MB, no arm at {own['bits']} bits fits")
        return found

    def _utility(self, arm: Arm) -> float:
        """Prior worth: saturating in rank, concave in depth and steps, falling with pruning
        (docs/specification.md)."""
        placement = self.placements[arm.placement]
        total = sum(placement.values())
        layers = len({m.layer for m in self.card.modules if m.name in placement})
        rank = total / max(1, len(placement))
        worth = (1 - 2.718281828 ** (-rank / 10)) * (layers / self.card.layers) ** 0.5
        return float(worth * (1 - arm.prune) * (arm.steps / max(self.space.steps)) ** 0.7)

    def choose(self, round: int, fleet: Sequence[tuple[str, DeviceProfile, float]]) -> dict[str, Choice]:
        """An arm for every device (name, profile, share of the data)."""
        members = [
            Member(device, profile.name, share, self.feasible(device, profile, round), self._last(device))
            for device, profile, share in sorted(fleet, key=lambda f: f[0])
        ]
        rng = random.Random(f"{self.seed}/{round}")
        chosen = self.policy.choose(members, self.state["policy"], round, rng) if members else {}
        for device, choice in chosen.items():
            own = self.state["devices"][device]
            if choice.arm.prune > own["prune"]:
                own["prune"], own["pruned_at"] = choice.arm.prune, round
            own["arm"] = msgspec.to_builtins(choice.arm)
            own["tight"] = False
        return chosen

    def _last(self, device: str) -> Arm | None:
        arm = self.state["devices"][device].get("arm")
        return msgspec.convert(arm, Arm) if arm else None

    def observe(
        self,
        outcomes: Sequence[Outcome],
        profiles: dict[str, DeviceProfile],
        bits_ms: dict[str, dict[str, float]],
    ) -> None:
        """Correct the models by what was measured, then let the policy learn."""
        for o in sorted(outcomes, key=lambda o: o.device):
            own = self.state["devices"].get(o.device)
            if own is None:
                continue
            if o.failed == "memory":
                own["memory"] *= 1.25
                own["bits"] = self._lower(
                    o.device, profiles[o.device], bits_ms.get(o.device, {}), int(own["bits"])
                )
            elif not o.failed and o.seconds > 0:
                cost = self._expected(o, profiles[o.device], own["speed"])
                own["speed"] *= min(2.0, max(0.5, (o.seconds / cost) ** 0.5))
        self.policy.observe(sorted(outcomes, key=lambda o: o.device), self.state["policy"])

    def _lower(self, device: str, profile: DeviceProfile, bits_ms: dict[str, float], now: int) -> int:
        try:
            return (
                now
                if self._smallest(device, now) <= profile.budget_mb
                else self._bits(device, profile, bits_ms, below=now)
            )
        except NoArm:
            return now

    def _expected(self, o: Outcome, profile: DeviceProfile, speed: float) -> float:
        return price(
            self.card,
            profile,
            self.placements[o.arm.placement],
            prune=o.arm.prune,
            bits=o.arm.bits,
            batch=o.arm.batch,
            steps=o.arm.steps,
            length=self.length,
            head=self.head,
            wire_bits=self.wire_bits,
            correction=speed,
        ).seconds

    def explain(self, device: str) -> dict[str, Any]:
        """What the tuner believes of a device."""
        own = self.state["devices"].get(device, {})
        return {
            **own,
            "numbers": adapter_parameters(self.card, self.placements[own["arm"]["placement"]], own["prune"])
            if own.get("arm")
            else 0,
        }
