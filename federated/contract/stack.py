"""A list of methods, run as one. Knows the order of hooks and nothing about any method."""

import hashlib
from collections.abc import Mapping
from typing import Any

from ..errors import Conflict
from .contexts import Round
from .hook_errors import check_mapping, run_hook
from .method import EXCLUSIVE, HOOKS, Method, overrides
from .spec import Spec
from .tensors import Array
from .update import LowRank

Change = dict[str, Array | LowRank]


def seed_of(*words: object) -> int:
    """A 64-bit seed from words such as (job, round, device, method); the same everywhere."""
    text = "\0".join(str(w) for w in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Stack:
    """Methods in the order given. Raises Conflict where two of them exclude each other."""

    def __init__(self, methods: Mapping[str, Method], space: str = "") -> None:
        self.methods = dict(methods)
        self._using = {h: [(n, m) for n, m in self.methods.items() if overrides(m, h)] for h in HOOKS}
        self.space = space or self._space()
        self.plain = any(m.plain for m in self.methods.values())
        self._check()
        self.legs: tuple[str, ...] = next(
            (m.legs for m in self.methods.values() if len(m.legs) > 1), ("train",)
        )
        """Parts of a round; to the engine each is a round of its own."""

    def _space(self) -> str:
        wanted = {m.space: n for n, m in reversed(self.methods.items()) if m.space != "any"}
        if len(wanted) > 1:
            raise Conflict(
                f"`{wanted['factors']}` needs factors that keep their coordinates, `{wanted['product']}` "
                "needs them renewed every round",
                "keep one of the two",
            )
        return next(iter(wanted), "product")

    def _check(self) -> None:
        for hook in EXCLUSIVE:
            users = [n for n, _ in self._using[hook]]
            if len(users) > 1:
                raise Conflict(f"`{users[0]}` and `{users[1]}` both define `{hook}`", "keep one of the two")
        if self._using["train"] and self._using["objective"]:
            raise Conflict(
                f"`{self._using['train'][0][0]}` replaces the loop in which "
                f"`{self._using['objective'][0][0]}` would set the loss",
                "keep one of the two",
            )
        self._check_codecs()
        self._check_sums()
        self._check_release()

    def _check_codecs(self) -> None:
        coded = ""
        for name, method in self.methods.items():
            if coded and overrides(method, "send") and method.codes != "floats" and not method.releases:
                raise Conflict(
                    f"`{name}` reads tensors that `{coded}` has coded",
                    f"put `{name}` before `{coded}`, or keep one of the two",
                )
            coded = name if method.codes else coded

    def _check_sums(self) -> None:
        if not (summing := next((n for n, m in self.methods.items() if m.sums), "")):
            return
        for name, method in self.methods.items():
            single = next((h for h in ("weigh", "admit", "receive") if overrides(method, h)), "")
            if name != summing and (method.needs_all or single):
                raise Conflict(
                    f"`{name}` looks at single updates, of which `{summing}` leaves nothing but the sum",
                    "keep one of the two",
                )

    def _check_release(self) -> None:
        released = ""
        for name, method in self.methods.items():
            if released and overrides(method, "send") and not method.releases:
                raise Conflict(
                    f"`{name}` changes what leaves the device after `{released}` has made it private",
                    f"put `{name}` before `{released}`",
                )
            released = name if method.releases else released
        telling = next((n for n, m in self.methods.items() if _tells(m)), "")
        if released and telling:
            raise Conflict(
                f"`{telling}` tells what it makes of examples beside the update that `{released}` has made "
                "private",
                "keep one of the two",
            )

    @property
    def releases(self) -> bool:
        """Is what leaves a device made private? Then its report says nothing of training examples either."""
        return any(m.releases for m in self.methods.values())

    @property
    def needs_all(self) -> bool:
        """Are single updates looked at several times?"""
        return any(m.needs_all for m in self.methods.values())

    def wire_bits(self, numbers: float) -> float:
        """Bits that an upload of so many numbers is expected to take, through all codecs in their order."""
        bits = 32.0 * numbers
        for n, m in self.using("wire_bits"):
            bits = run_hook(n, m, "wire_bits", numbers, bits)
        return bits

    def using(self, hook: str) -> list[tuple[str, Method]]:
        """The methods that define a hook, in order."""
        return self._using[hook]

    def at(self, number: int, total: int) -> Round:
        """The round that the engine counts as `number`: with several legs, each is one to the engine."""
        n = len(self.legs)
        return Round(number // n, -(-total // n), self.legs[number % n])

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """What the model computes with: `params`, and what methods make of them, in the order of the
        stack."""
        full = dict(params)
        for n, m in self.using("express"):
            full.update(check_mapping(n, "express", run_hook(n, m, "express", full, spec, xp)))
        return full


def _tells(method: Method) -> bool:
    """May what travels beside the update be made of examples? Where a method looks at the model and does
    not say, it may."""
    looks = any(overrides(method, hook) for hook in ("arrived", "trained", "answer"))
    return method.tells == "private" or (looks and not method.tells)
