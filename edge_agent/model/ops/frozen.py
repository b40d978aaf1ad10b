"""A frozen linear map in fp32, bf16, INT8 or NF4, and its two products: x·Wᵀ on the way forward, g·W on
the way back.

Few-bit weights are dequantised on each way instead of being kept. fp32 products go through oneDNN where a
real call of it works: it is 1.1 to 1.4 times as fast as the BLAS that `torch.nn.functional.linear` takes,
forward and with the transposed weight.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from .quantise import pack_nf4, unpack_nf4


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _onednn_add(x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, None, "add")
    return result


def _works() -> bool:
    """Does oneDNN's product give the right numbers here, with a transposed weight too? An inner call of
    torch's: asked, not assumed."""
    x, w, b = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 1, 20).view(5, 4), torch.ones(5)
    try:
        forward = torch.allclose(_onednn(x, w, b), linear(x, w, b), atol=1e-6)
        g = linear(x, w)
        back = torch.allclose(_onednn(g, w.t(), None), g @ w, atol=1e-6)
        return forward and back and torch.allclose(_onednn_add(g, w.t(), x), x + g @ w, atol=1e-6)
    except Exception:
        return False


ONEDNN = _works()


def _fast(x: Tensor) -> bool:
    return ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0


class Frozen:
    """One frozen map (out, in). `tensors` is what lies on disk for it; the dtype of its products is that
    of what comes in."""

    def __init__(self, out: int, in_: int, tensors: dict[str, Tensor], bias: Tensor | None = None) -> None:
        self.out, self.in_, self.tensors, self.bias = out, in_, tensors, bias

    @staticmethod
    def pack(weight: Tensor, bits: int) -> dict[str, Tensor]:
        """A weight (out, in) in 32, 16, 8 or 4 bits."""
        if bits == 32:
            return {"weight": weight.float().contiguous()}
        if bits == 16:
            return {"weight": weight.bfloat16().contiguous()}
        if bits == 8:
            scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-30)
            return {"int8": torch.round(weight.float() / scale.unsqueeze(1)).to(torch.int8), "scale": scale}
        return pack_nf4(weight)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in)."""
        if "weight" in self.tensors:
            return self.tensors["weight"].to(dtype)
        if "int8" in self.tensors:
            return self.tensors["int8"].float().mul_(self.tensors["scale"].unsqueeze(1)).to(dtype)
        return unpack_nf4(self.tensors, self.out, self.in_, dtype)

    def product(self, x: Tensor) -> Tensor:
        """x (n, in) → (n, out), with the bias."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _onednn(x, self.dense(x.dtype), bias) if _fast(x) else linear(x, self.dense(x.dtype), bias)

    def back(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """g (n, out) → g·W (n, in), added to `onto` where there is one."""
        weight = self.dense(g.dtype)
        if not _fast(g):
            return g @ weight if onto is None else torch.addmm(onto, g, weight)
        return _onednn(g, weight.t(), None) if onto is None else _onednn_add(g, weight.t(), onto)

    def to(self, device: torch.device) -> None:
        """Move it."""
        self.tensors = {k: t.to(device) for k, t in self.tensors.items()}
        self.bias = None if self.bias is None else self.bias.to(device)

    def nbytes(self) -> int:
        """Bytes that it takes."""
        kept = [*self.tensors.values(), *([] if self.bias is None else [self.bias])]
        return sum(t.numel() * t.element_size() for t in kept)
