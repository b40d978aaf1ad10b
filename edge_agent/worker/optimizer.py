"""The optimiser of a round: all trained tensors as one flat vector, so that a step is a handful of
operations.

torch.optim would do, but its first use imports torch's compiler and SymPy: 70 MB and a second or two of
every round on a small board.
"""

import math

import torch
from torch import Tensor

MAX_NORM = 1.0


class Flat:
    """All trained tensors as one: they become views of `values`, their gradients views of `gradient`."""

    def __init__(self, params: dict[str, Tensor], start: dict[str, Tensor]) -> None:
        self.values = torch.cat([start[k].detach().reshape(-1) for k in params]) if params else torch.zeros(0)
        self.gradient = torch.zeros_like(self.values)
        self.places: dict[str, Tensor] = {}
        at = 0
        for k, p in params.items():
            p.data = self.values[at : at + p.numel()].view(p.shape)
            self.places[k] = self.gradient[at : at + p.numel()].view(p.shape)
            at += p.numel()

    def take(self, grads: dict[str, Tensor], norm: float = MAX_NORM) -> None:
        """Gradients by name, clipped to `norm` together; 0: as they are."""
        torch._foreach_copy_(list(self.places.values()), [grads[k] for k in self.places])
        if norm:
            self.gradient.mul_((norm / (self.gradient.norm() + 1e-6)).clamp_max(1.0))


class SGD:
    """values ← values − lr·gradient."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def step(self, values: Tensor, gradient: Tensor, lr: float) -> None:
        """One step, in place."""
        values.add_(gradient, alpha=-lr)


class AdamW:
    """Adam with bias correction (Kingma & Ba, 2015, algorithm 1); the decay of AdamW would be zero for
    adapters, so there is none.

    `state` is what a checkpoint keeps: both moments, like the vector, and the number of steps, on the CPU.
    """

    def __init__(self, like: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.state = {
            "mean": torch.zeros_like(like),
            "square": torch.zeros_like(like),
            "steps": torch.zeros(1),
        }
        self._scratch = torch.empty_like(like)

    def step(self, values: Tensor, gradient: Tensor, lr: float) -> None:
        """One step, in place."""
        (first, second), mean, square = self.betas, self.state["mean"], self.state["square"]
        steps = int(self.state["steps"].add_(1))
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = torch.sqrt(square, out=self._scratch).div_(math.sqrt(1 - second**steps)).add_(self.eps)
        values.addcdiv_(mean, scale, value=-lr / (1 - first**steps))


def optimizer(name: str, values: Tensor) -> "SGD | AdamW":
    """By its name in the job, for a vector like `values`."""
    return SGD() if name == "sgd" else AdamW(values)
