"""Where the worker computes: a CUDA device where a real training step of it works, else the CPU. Nothing
is assumed from a name."""

import torch

from rankfleet.federated.errors import Refused

_found: torch.device | None = None


def accelerator(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda`. Raises Refused where `cuda` is asked for by name and does not work."""
    global _found
    if wanted == "cpu":
        return torch.device("cpu")
    if _found is None:
        _found = torch.device("cuda") if torch.cuda.is_available() and _works() else torch.device("cpu")
    if wanted == "cuda" and _found.type != "cuda":
        raise Refused(
            "`worker: {accelerator: cuda}`, but no CUDA kernel runs here",
            "edge-agent doctor; or accelerator: auto",
        )
    return _found


def _works() -> bool:
    """A product and its gradient on the device, against the CPU. A wheel for other compute capabilities
    fails only when it is used."""
    x, w = torch.linspace(-1, 1, 64).view(8, 8), torch.linspace(0, 1, 64).view(8, 8)
    try:
        on = x.cuda().requires_grad_()
        (gradient,) = torch.autograd.grad((on @ w.cuda()).square().sum(), on)
        return bool(torch.allclose(gradient.cpu(), 2 * (x @ w) @ w.t(), rtol=1e-2, atol=1e-3))
    except Exception:
        return False


def wait(device: torch.device) -> None:
    """Until the device has done what it was told: what a clock needs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
