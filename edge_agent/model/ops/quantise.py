"""NF4 with double quantisation: 4.127 bits a weight, in the layout of bitsandbytes, whose kernel reads our
bytes where it runs.

Levels are quantiles of the normal distribution, in blocks of 64 (Dettmers et al., 2023, section 3). The
blocks' maxima, less their mean, are kept as 8-bit floats of their own kind in blocks of 256 (there,
"double quantisation"; the table is that of Dettmers et al., 2016, dynamic tree quantisation). Packing is
high nibble first.
"""

import ctypes
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK, OUTER = 64, 256


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published levels (Dettmers et al., 2023, appendix E); their last bits differ from fresh quantiles,
so they are written out."""

_LEVELS = torch.tensor(NF4)
_PAIRS = torch.stack([_LEVELS.repeat_interleave(16), _LEVELS.repeat(16)], dim=1)
"""Byte → its two levels."""
Packed = dict[str, Tensor]


def _tree() -> Tensor:
    """256 values of a dynamic 8-bit float: seven decades, each cut twice as finely as the one below; with
    0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0) * 10.0 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


_TREE = _tree()
_TREE_MIDDLES = (_TREE[1:] + _TREE[:-1]) / 2


def pack_nf4(weight: Tensor) -> Packed:
    """A weight (out, in), zero-padded to whole blocks: `nf4` u8 (n/2,), `max8` u8 (n/64,), `max` fp32
    (n/64/256,), `mean` fp32 ()."""
    flat = weight.detach().float().reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(dim=1)
    scaled = flat * (1.0 / absmax.clamp_min(1e-30)).unsqueeze(1)  # as bitsandbytes rounds
    middles = (_LEVELS[1:] + _LEVELS[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8).view(-1, 2)
    return {"nf4": (codes[:, 0] << 4) | codes[:, 1], **_pack_maxima(absmax)}


def _pack_maxima(absmax: Tensor) -> Packed:
    mean = absmax.mean()
    shifted = absmax - mean
    padded = torch.nn.functional.pad(shifted, (0, -shifted.numel() % OUTER)).view(-1, OUTER)
    outer = padded.abs().amax(dim=1)
    codes = torch.bucketize(padded / outer.clamp_min(1e-30).unsqueeze(1), _TREE_MIDDLES, out_int32=True)
    return {"max8": codes.to(torch.uint8).view(-1)[: absmax.numel()].clone(), "max": outer, "mean": mean}


def maxima(packed: Packed) -> Tensor:
    """The blocks' maxima, fp32 (n/64,)."""
    codes = packed["max8"]
    values = torch.nn.functional.embedding(codes.int(), _TREE.to(codes.device).unsqueeze(1)).view(-1)
    outer = packed["max"].repeat_interleave(OUTER)[: codes.numel()]
    return values.mul_(outer).add_(packed["mean"])


def unpack_nf4(packed: Packed, out: int, in_: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight (out, in), fp32 or rounded to bf16."""
    codes, absmax = packed["nf4"], maxima(packed)
    if codes.device.type == "cuda" and _cuda:
        return _on_cuda(packed, absmax, out, in_, dtype)
    if dtype in _kernels and out * in_ % BLOCK == 0 and codes.device.type == "cpu":
        return _with_kernel(codes, absmax, out, in_, dtype)
    # A lookup as an embedding is three times as fast as indexing.
    pairs = torch.nn.functional.embedding(codes.int(), _PAIRS.to(codes.device))
    values = pairs.view(-1, BLOCK).mul_(absmax.unsqueeze(1))
    return values.view(-1)[: out * in_].view(out, in_).to(dtype)


def packed_bytes(weights: int, bits: int, rows: int) -> int:
    """Bytes that a map of so many weights in so many rows takes."""
    if bits >= 16:
        return weights * bits // 8
    if bits == 8:
        return weights + 4 * rows
    blocks = math.ceil(weights / BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * math.ceil(blocks / OUTER) + 4


_kernels: dict[torch.dtype, Any] = {}
_cuda: list[Any] = []
"""bitsandbytes' functions, once they gave the right numbers on a GPU."""


def use_bitsandbytes(device: torch.device | str = "cpu") -> bool:
    """Read NF4 with the kernels of bitsandbytes from now on, if real calls of them give the right numbers
    here.

    On the CPU its library is called directly: importing the package takes 126 MB, and it looks for further
    kernels on a hub.
    """
    if torch.device(device).type == "cuda":
        return _use_cuda()
    if _kernels:
        return True
    packed = pack_nf4(torch.linspace(-1, 1, 512).view(2, 256))
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        expected = unpack_nf4(packed, 2, 256, dtype)
        try:
            _kernels[dtype] = _cpu_kernel(name)
            if torch.equal(unpack_nf4(packed, 2, 256, dtype), expected):
                continue
        except (OSError, AttributeError, ValueError) as error:
            # Not installed, another system's, or without this function: all mean that we do without it.
            _ = error
        _kernels.pop(dtype, None)
    return bool(_kernels)


def _use_cuda() -> bool:
    if _cuda:
        return True
    packed = {k: t.cuda() for k, t in pack_nf4(torch.linspace(-1, 1, 512).view(2, 256)).items()}
    expected = unpack_nf4(packed, 2, 256)
    try:
        from bitsandbytes import functional

        _cuda.append(functional)
        if torch.allclose(unpack_nf4(packed, 2, 256), expected, atol=1e-6):
            return True
    except Exception as error:
        # Not installed, without kernels for this GPU, or with another signature: all mean that we do without
        # it.
        _ = error
    _cuda.clear()
    return False


def _on_cuda(packed: Packed, absmax: Tensor, out: int, in_: int, dtype: torch.dtype) -> Tensor:
    (functional,) = _cuda
    code = _LEVELS.to(absmax.device)
    padded = out * in_ + -out * in_ % BLOCK
    state = functional.QuantState(
        absmax, shape=torch.Size([padded]), code=code, blocksize=BLOCK, quant_type="nf4", dtype=dtype
    )
    made: Tensor = functional.dequantize_4bit(packed["nf4"].view(-1, 1), state)
    return made.view(-1)[: out * in_].view(out, in_)


def _cpu_kernel(name: str) -> Any:
    """The dequantiser in the library beside the package. Raises OSError or AttributeError where there is
    none."""
    found = importlib.util.find_spec("bitsandbytes")
    if found is None or found.origin is None:
        raise OSError("bitsandbytes is not installed")
    (file, *_) = [*Path(found.origin).parent.glob("libbitsandbytes_cpu.*"), Path("none")]
    kernel = getattr(ctypes.CDLL(str(file)), f"cdequantize_blockwise_cpu_nf4_{name}")
    kernel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_longlong,
        ctypes.c_longlong,
        ctypes.c_longlong,
    ]
    kernel.restype = None
    return kernel


def _with_kernel(codes: Tensor, absmax: Tensor, out: int, in_: int, dtype: torch.dtype) -> Tensor:
    # Rows that are no whole blocks go as rows of one block each: the kernel (0.50) mixes up their maxima.
    rows, width = (out, in_) if in_ % BLOCK == 0 else (out * in_ // BLOCK, BLOCK)
    result, codes, absmax = torch.empty(out, in_, dtype=dtype), codes.contiguous(), absmax.contiguous()
    _kernels[dtype](codes.data_ptr(), absmax.data_ptr(), result.data_ptr(), BLOCK, rows, width)
    return result
