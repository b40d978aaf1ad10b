"""Frozen linear maps in few bits: INT8 with one scale per row, NF4 in blocks of 64.

NF4 levels are quantiles of the normal distribution (Dettmers et al., 2023, section 3). Packing
is that of bitsandbytes, high nibble first, so its kernel reads our bytes where it runs; pure torch otherwise. The backward
pass dequantises again instead of keeping a full-precision copy.
"""

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published levels (Dettmers et al., 2023, appendix E); their last bits differ from fresh quantiles, so they are written out."""

_LEVELS = torch.tensor(NF4)
_PAIRS = torch.stack([_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], dim=1)
"""Byte → its two levels."""


def pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(packed u8 (n/2,), absmax fp32 (n/64,)) of a weight (out, in), zero-padded to whole blocks."""
    flat = weight.detach().float().reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(dim=1)
    scaled = flat / absmax.clamp_min(1e-30).unsqueeze(1)
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2
    codes = torch.bucketize(scaled, middles).to(torch.uint8).view(-1, 2)
    return (codes[:, 0] << 4) | codes[:, 1], absmax


def unpack_nf4(packed: Tensor, absmax: Tensor, out: int, in_: int) -> Tensor:
    """The weight (out, in), fp32."""
    if _kernel is not None and out * in_ % BLOCK == 0:
        return _with_kernel(packed, absmax, out, in_)
    # A lookup as an embedding is three times as fast as indexing.
    pairs = torch.nn.functional.embedding(packed.int(), _PAIRS.to(packed.device))
    values = pairs.view(-1, BLOCK) * absmax.unsqueeze(1)
    return values.view(-1)[: out * in_].view(out, in_)


_kernel: Any = None


def use_bitsandbytes() -> bool:
    """Read NF4 with bitsandbytes from now on, if a real call on this machine gives the right numbers."""
    global _kernel
    if _kernel is not None:
        return True
    try:
        import bitsandbytes.functional as functional

        weight = torch.linspace(-1, 1, 128).view(2, 64)
        packed, absmax = pack_nf4(weight)
        expected = unpack_nf4(packed, absmax, 2, 64)
        _kernel = functional
        if torch.allclose(unpack_nf4(packed, absmax, 2, 64), expected, atol=1e-6):
            return True
    except Exception as error:
        # Any failure of a foreign kernel means the same: do without it.
        _ = error
    _kernel = None
    return False


def _with_kernel(packed: Tensor, absmax: Tensor, out: int, in_: int) -> Tensor:
    state = _kernel.QuantState(
        absmax, shape=torch.Size((out, in_)), code=_LEVELS.to(packed.device), blocksize=BLOCK, quant_type="nf4", dtype=torch.float32
    )
    result: Tensor = _kernel.dequantize_4bit(packed.view(-1, 1), state)
    return result


class _Frozen(torch.autograd.Function):
    """y = x·Wᵀ with W dequantised on the way forward and again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantLinear") -> Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.dense().to(x.dtype), layer.bias_as(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dense().to(grads[0].dtype), None


class QuantLinear(nn.Module):
    """A frozen `nn.Linear` in 8 or 4 bits."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.out_features, self.in_features = bits, linear.out_features, linear.in_features
        weight = linear.weight.detach()
        if bits == 4:
            packed, scale = pack_nf4(weight)
        else:
            scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
            packed = torch.round(weight / scale.unsqueeze(1)).to(torch.int8)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    packed: Tensor
    scale: Tensor
    bias: Tensor | None

    def dense(self) -> Tensor:
        """The weight, fp32 (out, in)."""
        if self.bits == 4:
            return unpack_nf4(self.packed, self.scale, self.out_features, self.in_features)
        return self.packed.float() * self.scale.unsqueeze(1)

    def bias_as(self, x: Tensor) -> Tensor | None:
        """The bias in the dtype of `x`."""
        return None if self.bias is None else self.bias.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        result: Tensor = _Frozen.apply(x, self)  # type: ignore[no-untyped-call]
        return result


class HalfEmbedding(nn.Module):
    """A frozen embedding stored in fp16, looked up as fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.register_buffer("weight", embedding.weight.detach().half())
        self.padding_idx = embedding.padding_idx

    weight: Tensor

    def forward(self, index: Tensor) -> Tensor:
        """Indices → fp32 rows."""
        return torch.nn.functional.embedding(index, self.weight).float()
