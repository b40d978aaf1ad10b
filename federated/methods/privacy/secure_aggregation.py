"""Secure aggregation: the coordinator learns the sum of updates, under pairwise masks (Bonawitz et al.,
2017, protocol 0 and section 4).

Three legs. keys: each device draws an X25519 key for this round. train: every pair (i, j) has a seed s_ij,
the hash of its shared secret; device i sends y_i = x_i + Σ_{j>i} PRG(s_ij) - Σ_{j<i} PRG(s_ij) mod 2³²,
x_i in fixed point, PRG = SHAKE-256. unmask: every device that sent y tells s_ij of each j that answered
`keys` and not `train`; with them the coordinator takes off what is left. All tensors of the global adapter
are masked in its shapes, zeros where a device holds less, so devices of unlike rank and depth cancel. The
result is the plain mean over who sent.

What the coordinator learns: the sum over those who sent, who they are, their public keys, how many of
their entries were clipped, and seeds of pairs with a lost device. Never s_ij of two devices that both
sent. Threshold: one lost device needs the seed of every device that sent: any may die between train and
unmask where nobody was lost before; where somebody was, all must answer, else the sum stays closed and the
round moves nothing. Devices tell no seeds where fewer than `least` would be left in the sum, and mask for
no fewer. What it does not give: Bonawitz's second mask and its shares are not here. So a coordinator that
calls a device lost whose y it has, or gets later, can open that y; the coordinator here ignores what is
late, and has to be trusted in that (job field `late: drop`). Nor are public keys signed by devices: a
coordinator that gives out keys of its own reads everything. Honest but curious, no more.

Reconstructed: clipping, fixed point, SHAKE-256 and the shapes. Secrets are of `os.urandom`, as `ctx.rng`
can be computed by everybody; they lie in the device's state, so a device that restarts goes on with the
same, and leave it in the unmask leg.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import Arrival, ClientContext, ServerContext, StepContext
from ...contract.method import Method
from ...contract.tensors import Array, Tensors
from ...contract.update import Update
from ...errors import Refused

KEY, SHAPE, SUM = "key ", "shape ", "masked "
"""What names of tensors beside view and update begin with."""
ONE: np.uint32 = np.uint32(1)
MINUS_ONE: np.uint32 = np.uint32(0xFFFFFFFF)


class SecureAggregation(Method, frozen=True):
    """`ask`, `answer`, `hear` around a round; `send` masks, `reduce` keeps the masked sum."""

    space: ClassVar[str] = "factors"
    legs: ClassVar[tuple[str, ...]] = ("keys", "train", "unmask")
    releases: ClassVar[bool] = True
    sums: ClassVar[bool] = True
    tells: ClassVar[Literal["", "public", "private"]] = "public"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "an honest coordinator may know the sum of updates and nothing more"

    bound: Annotated[float, Meta(gt=0, description="entries are clipped to ± this")] = 1.0
    one: Annotated[int, Meta(ge=1, le=1 << 30, description="fixed point: so many steps are 1")] = 1 << 16
    least: Annotated[int, Meta(ge=2, description="devices that a sum must be made of")] = 2

    def ready(
        self, arrived: Sequence[Arrival], out: Sequence[str], elapsed: float, ctx: ServerContext
    ) -> bool:
        """Everybody, or the job's deadline: what is late cannot be used, so no other method may close
        earlier."""
        return not out

    def ask(self, device: str, ctx: ServerContext) -> Tensors | None:
        """Nothing but to answer; in the unmask leg the names of lost devices."""
        if ctx.round.leg == "keys":
            return {}
        return {d: np.ones(1, np.uint8) for d in _lost(ctx)} if device in ctx.state.get("sent", ()) else None

    def answer(self, question: Tensors, ctx: StepContext) -> Tensors:
        """A public key (32 bytes); or the seeds (32 bytes each) of pairs with lost devices."""
        if ctx.round.leg == "keys":
            if ctx.state.get("round") != ctx.round.number:
                ctx.state.clear()
                ctx.state.update(round=ctx.round.number, secret=_bytes(os.urandom(32)))
            return {"key": _bytes(_public(ctx.state))}
        peers = ctx.state.get("peers", {})
        lost = sorted(set(question) & set(peers) - {ctx.device})
        known = ctx.state.get("round") == ctx.round.number and len(peers) - len(lost) >= self.least
        seeds = {d: _bytes(seed(ctx.state, peers[d])) for d in lost} if known else {}
        ctx.state.pop("secret", None)
        return seeds

    def offer(self, adapter: Tensors, device: str, ctx: ServerContext) -> Tensors:
        """Everybody's public keys and the global adapter's shapes travel beside the view in the train leg."""
        if ctx.round.leg == "train":
            ctx.down.update({KEY + d: k for d, k in ctx.state.get("keys", {}).items()})
            shapes = {
                f"{m}.{side}": t.shape
                for m, p in ctx.adapter.pairs.items()
                for side, t in (("A", p.A), ("B", p.B))
            }
            shapes |= {k: t.shape for k, t in ctx.adapter.dense.items()}
            ctx.down.update({SHAPE + k: np.array(s, np.int64) for k, s in shapes.items()})
        return adapter

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """All that leaves is beside the update: fixed point under the masks, uint32. Raises Refused."""
        peers = {k.removeprefix(KEY): t for k, t in ctx.down.items() if k.startswith(KEY)}
        self._check(peers, ctx)
        ctx.state["peers"] = peers
        seeds = {d: seed(ctx.state, key) for d, key in sorted(peers.items()) if d != ctx.device}
        ctx.up["beyond"] = np.array(
            [sum(int((np.abs(t) > self.bound).sum()) for t in delta.values())], np.int64
        )
        for name in sorted(k.removeprefix(SHAPE) for k in ctx.down if k.startswith(SHAPE)):
            total = _widened(
                self.fixed(delta[name]) if name in delta else None, tuple(ctx.down[SHAPE + name])
            )
            for other, s in seeds.items():
                total = total + mask(s, name, total.shape) * sign(ctx.device, other)
            ctx.up[SUM + name] = total
        return {}

    def _check(self, peers: Mapping[str, Array], ctx: ClientContext) -> None:
        if ctx.state.get("round") != ctx.round.number or bytes(peers.get(ctx.device, b"")) != _public(
            ctx.state
        ):
            raise Refused(
                "`secure_aggregation`: this device's key of the round is not among those that arrived"
            )
        if len(peers) < self.least:
            raise Refused(
                f"`secure_aggregation`: {len(peers)} devices gave keys, a sum is made of {self.least}"
            )
        if len(peers) * self.bound * self.one >= 1 << 31:
            raise Refused(
                f"`secure_aggregation`: the sum of {len(peers)} devices does not fit",
                "lower `bound` or `one`",
            )
        if any((p.kept_out, p.kept_in) != (p.out, p.in_) for p in ctx.spec.pairs.values()):
            raise Refused(
                "`secure_aggregation` works on whole maps, and this round's are pruned",
                "set `arms: {prune: [0]}` in the job",
            )

    def fixed(self, t: Array) -> Array:
        """Clipped, in steps of 1/one, two's complement in uint32."""
        steps = np.rint(np.clip(t.astype(np.float64), -self.bound, self.bound) * self.one)
        return np.asarray(steps, np.int64).astype(np.uint32)

    def reduce(self, updates: Sequence[Update], ctx: ServerContext) -> Mapping[str, Array]:
        """The masked sum waits for the unmask leg. What is late was masked for another round."""
        mine = {u.device: _sums(u.extra_of(self)) for u in updates if not u.age}
        ctx.state["sent"] = sorted(d for d, t in mine.items() if t and d in ctx.state.get("keys", {}))
        names = sorted({k for d in ctx.state["sent"] for k in mine[d]})
        ctx.state["sum"] = {
            k: sum((mine[d][k] for d in ctx.state["sent"]), np.zeros((), np.uint32)) for k in names
        }
        return {}

    def hear(self, answers: Mapping[str, Tensors], ctx: ServerContext) -> Mapping[str, Array]:
        """Keys are kept. Seeds take off what is left of the masks, and the mean is the change; {} where
        one is missing."""
        if ctx.round.leg == "keys":
            ctx.state["keys"] = {d: a["key"] for d, a in answers.items() if "key" in a}
            return {}
        lost, sent, total = _lost(ctx), ctx.state.pop("sent", []), ctx.state.pop("sum", {})
        ctx.state.pop("keys", None)
        seeds = {(d, gone): answers.get(d, {}).get(gone) for d in sent for gone in lost}
        if len(sent) < self.least or any(s is None for s in seeds.values()):
            ctx.state["closed"] = ctx.state.get("closed", 0) + 1
            return {}
        for (device, gone), s in seeds.items():
            total = {k: t - mask(bytes(s), k, t.shape) * sign(device, gone) for k, t in total.items()}  # type: ignore[arg-type]
        return {
            k: (t.view(np.int32) / (self.one * len(sent))).astype(np.float32)
            for k, t in total.items()
            if t.any()
        }


def _lost(ctx: ServerContext) -> list[str]:
    """Who answered `keys` and not `train`."""
    return sorted(set(ctx.state.get("keys", {})) - set(ctx.state.get("sent", ())))


def _sums(extra: Tensors) -> Tensors:
    return {k.removeprefix(SUM): t for k, t in extra.items() if k.startswith(SUM)}


def _bytes(data: bytes) -> Array:
    return np.array(list(data), np.uint8)


def _widened(part: Array | None, shape: tuple[int, ...]) -> Array:
    """`part` in the first places of zeros of this shape."""
    whole = np.zeros(shape, np.uint32)
    if part is not None:
        whole[tuple(slice(n) for n in part.shape)] = part
    return whole


def _public(state: Mapping[str, Any]) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(bytes(state["secret"])).public_key().public_bytes_raw()


def seed(state: Mapping[str, Any], key: Array) -> bytes:
    """A pair's seed, 32 bytes, the same on both sides: SHA-256 of its shared secret and both public keys.
    Raises Refused."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        shared = X25519PrivateKey.from_private_bytes(bytes(state["secret"])).exchange(
            X25519PublicKey.from_public_bytes(bytes(key))
        )
    except ValueError as error:
        raise Refused(f"`secure_aggregation`: a public key is none: {error}") from None
    return hashlib.sha256(b"".join([shared, *sorted([_public(state), bytes(key)])])).digest()


def mask(seed: bytes, name: str, shape: tuple[int, ...]) -> Array:
    """Uniform over 2³², of a pair's seed and a tensor's name."""
    data = hashlib.shake_256(seed + name.encode()).digest(4 * int(np.prod(shape)))
    words: Array = np.frombuffer(data, "<u4").astype(np.uint32)
    return words.reshape(shape)


def sign(device: str, other: str) -> np.uint32:
    """One of a pair adds what the other takes away."""
    return ONE if device < other else MINUS_ONE
