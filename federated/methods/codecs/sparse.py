"""Sparse upload: top-k with error feedback, INT8 values and an entropy-coded index. The default codec.

Top-k with memory: Stich, Cordonnier, Jaggi, 2018, algorithm 1; per class of tensors (A, B, heads) rather
than one pool, so that a large head cannot starve the factors (docs/specification.md). Our own choices: one
scale per class; the index is a bitmap under Huffman coding, within 3% of its entropy for densities from
1/2 to 1/32; what rounding loses stays in the memory too, so nothing is ever dropped for good. The memory
itself is 16-bit fixed point (rounding error below 2⁻¹⁶ of its largest entry, without bias): a device
writes it after every round. It lives in factor coordinates and goes when they change.
"""

import math
import struct
import zlib
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from ...contract.contexts import ClientContext, ServerContext
from ...contract.method import Method
from ...contract.tensors import Array, Tensors
from ...contract.update import Update
from ...errors import WireError

CLASSES = ("A", "B", "D")


def class_of(name: str) -> str:
    """A or B for a factor, D for a dense tensor."""
    return name[-1] if name.endswith((".A", ".B")) else "D"


class Sparse(Method, frozen=True):
    """`send` gives one u8 array per class: mask of names, scale, coded bitmap, coded values."""

    codes: ClassVar[Literal["", "tensors", "floats"]] = "tensors"
    evidence: ClassVar[str] = "toy-checked"
    use_when: ClassVar[str] = "always, unless you compare with dense uploads; lower `keep` on metered links"

    keep: Annotated[float, Meta(gt=0, le=1, description="share of entries that is sent in a round")] = 0.25

    def send(self, delta: Tensors, ctx: ClientContext) -> Tensors:
        """Entries over the class's threshold leave; the rest waits in `ctx.state`."""
        memory: Tensors = ctx.state.setdefault("residual", {})
        steps: dict[str, float] = ctx.state.setdefault("step", {})
        sent: Tensors = {}
        for group in CLASSES:
            names = [k for k in sorted(ctx.spec.shapes()) if class_of(k) == group]
            held = [k for k in names if k in delta]
            if not held:
                continue
            total = np.concatenate([delta[k].reshape(-1) for k in held]).astype(np.float32, copy=False)
            at = 0
            for k in held:
                if k in memory:
                    total[at : at + delta[k].size] += memory[k].reshape(-1) * np.float32(steps[k])
                at += delta[k].size
            body, decoded = encode(total, self.keep)
            present = np.packbits([k in delta for k in names]).tobytes()
            sent[group] = np.frombuffer(present + body, np.uint8)
            total -= decoded
            step = float(np.abs(total).max(initial=0.0)) / 32767 or 1.0
            rest, at = np.rint(total / np.float32(step)).astype(np.int16), 0
            for k in held:
                memory[k], steps[k] = rest[at : at + delta[k].size].reshape(delta[k].shape), step
                at += delta[k].size
        return sent

    def wire_bits(self, numbers: float, bits: float) -> float:
        """The index's entropy and a byte for each value, with 5% for framing."""
        k = self.keep
        if k >= 1:
            return bits
        entropy = -k * math.log2(k) - (1 - k) * math.log2(1 - k)
        return numbers * (entropy + k * 8) * 1.05

    def receive(self, delta: Tensors, update: Update, ctx: ServerContext) -> Tensors:
        """Dense deltas again, shaped by the spec."""
        shapes, out = update.spec.shapes(), {}
        for group, coded in delta.items():
            names = [k for k in shapes if class_of(k) == group]
            data = coded.tobytes()
            width = (len(names) + 7) // 8
            if len(data) < width:
                raise WireError(f"class {group} of a sparse update has {len(data)} bytes")
            flags: Array = np.unpackbits(np.frombuffer(data[:width], np.uint8), count=len(names))
            held = [k for k, flag in zip(names, flags, strict=False) if flag]
            sizes = [int(np.prod(shapes[k])) for k in held]
            flat, at = decode(data[width:], sum(sizes)), 0
            for k, size in zip(held, sizes, strict=True):
                out[k] = flat[at : at + size].reshape(shapes[k])
                at += size
        return out


def encode(values: Array, keep: float) -> tuple[bytes, Array]:
    """`values` (n,) as bytes, and what the receiver will read from them. Non-finite input is a WireError."""
    size = np.abs(values)
    top = float(size.max(initial=0.0))
    if not np.isfinite(top):
        raise WireError("the update holds NaN or infinity")
    count = max(1, int(keep * values.size))
    step = np.float32(top / 127 or 1.0)
    # Whatever rounds to zero does not travel, so half a step is always part of the threshold. Indices beat
    # boolean masks tenfold.
    least = (
        np.partition(size, values.size - count)[values.size - count] if count < values.size else np.float32(0)
    )
    place = np.flatnonzero(size >= max(least, step * np.float32(0.5)))
    levels = np.rint(values[place] / step).astype(np.int8)
    if not levels.all():
        place, levels = place[levels != 0], levels[levels != 0]
    chosen = np.zeros(values.size, np.uint8)
    chosen[place] = 1
    index = deflate(np.packbits(chosen).tobytes())
    decoded = np.zeros(values.size, np.float32)
    decoded[place] = levels * step
    return struct.pack("<fI", step, len(index)) + index + deflate(levels.tobytes()), decoded


def decode(data: bytes | memoryview, size: int) -> Array:
    """The inverse of `encode` for `size` values. Raises WireError on anything that `encode` does not
    write."""
    if len(data) < 8:
        raise WireError(f"a sparse tensor of {len(data)} bytes is too short")
    step, length = struct.unpack("<fI", data[:8])
    bits = np.unpackbits(np.frombuffer(inflate(data[8 : 8 + length], (size + 7) // 8), np.uint8), count=size)
    place = np.flatnonzero(bits.view(bool))
    levels = np.frombuffer(inflate(data[8 + length :], len(place)), np.int8)
    if not np.isfinite(step):
        raise WireError(f"scale of a sparse tensor is {step}")
    out = np.zeros(size, np.float32)
    out[place] = levels * np.float32(step)
    return out


def deflate(data: bytes) -> bytes:
    """Huffman coding only: order-0 entropy is all there is to gain, and it is four times as fast."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def inflate(data: bytes | memoryview, size: int) -> bytes:
    """Exactly `size` bytes, or WireError; never more memory than that."""
    coder = zlib.decompressobj(-15)
    try:
        out = coder.decompress(data, size + 1) if size else coder.decompress(data, 1)
    except zlib.error as error:
        raise WireError(f"coded tensor: {error}") from None
    if len(out) != size or not coder.eof or coder.unused_data:
        raise WireError(f"coded tensor holds {len(out)} bytes where {size} were announced")
    return out
