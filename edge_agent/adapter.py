"""The adapted layer: W·x + s·B·A·x + C_B·C_A·x, a trainable pair and an optional frozen carry on a frozen linear map."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Adapted(nn.Module):
    """Wraps a frozen linear module. Factors are fp32 masters; they are cast to the input's dtype at use."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.A: nn.Parameter | None = None
        self.B: nn.Parameter | None = None
        self.scale = 1.0
        self.carry: tuple[Tensor, Tensor] | None = None

    def place(self, a: Tensor, b: Tensor, scale: float, trained: bool) -> None:
        """Put a pair A (r, in), B (out, r) in; `trained` decides whether autograd sees it."""
        self.A = nn.Parameter(a.clone(), requires_grad=trained)
        self.B = nn.Parameter(b.clone(), requires_grad=trained)
        self.scale = scale

    def clear(self) -> None:
        """Take the pair out: the base alone."""
        self.A = self.B = None

    @property
    def weight(self) -> Tensor:
        """The base weight's stand-in; some models look at its dtype."""
        weight: Tensor = getattr(self.base, "weight", None) if hasattr(self.base, "weight") else self.base.scale  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        y: Tensor = self.base(x)
        if self.A is not None and self.B is not None:
            y = y + linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype) * self.scale)
        if self.carry is not None:
            y = y + linear(linear(x, self.carry[1].to(x.dtype)), self.carry[0].to(x.dtype))
        return y


def frozen(model: nn.Module) -> nn.Module:
    """No parameter of `model` is trained; dropout off."""
    for p in model.parameters():
        p.requires_grad_(False)
    return model.eval()


def as_tensor(array: object, device: torch.device | str = "cpu") -> Tensor:
    """A NumPy array (maybe read-only, maybe fp16) as an fp32 tensor of its own."""
    import numpy as np

    return torch.from_numpy(np.array(array, dtype=np.float32, copy=True)).to(device)
