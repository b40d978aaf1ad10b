"""What this device is: a quick look with psutil and the board's own files, and a real kernel per quantiser.

`facts` is cheap and needs no torch. `kernels` runs in a process of its own (`python -m
rankfleet.edge_agent.machine.probe`): the idle service
must not import torch. What the probe cannot measure, the matching profile says.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from rankfleet.profiles.device import DeviceProfile, library, match
from rankfleet.profiles.kernels import WIDTHS, half, key

from ..config import AgentConfig

BOARD = Path("/proc/device-tree/model")


def _battery() -> Any:
    """None where there is none, or where the system does not say (containers hide it)."""
    try:
        return psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (OSError, RuntimeError):
        return None


def facts() -> dict[str, Any]:
    """Machine, board, cores, memory, temperature and GPUs, as far as the system tells."""
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "board": BOARD.read_text(errors="replace").strip("\0 \n") if BOARD.exists() else "",
        "cores": os.cpu_count() or 1,
        "memory_mb": round(memory.total / (1 << 20)),
        "available_mb": round(memory.available / (1 << 20)),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        "disk_free_mb": round(psutil.disk_usage(str(Path.home())).free / (1 << 20)),
        "gpus": gpus(),
    }
    battery = _battery()
    if battery is not None:
        found["battery"] = {"percent": battery.percent, "plugged": battery.power_plugged}
    return found


def gpus() -> list[str]:
    """Names of NVIDIA GPUs, by NVML where it is installed, by jtop's board file or the driver's on
    Jetsons."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return [str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count)]
    except Exception as error:
        # NVML is missing, too old, or there is no driver: all mean that we look elsewhere.
        _ = error
    try:
        from jtop import jtop  # type: ignore[import-not-found]

        with jtop() as board:
            return [str(board.board["hardware"]["Module"])]
    except Exception as error:
        # jetson-stats is missing, its service is not running, or its answer has another shape.
        _ = error
    tegra = Path("/etc/nv_tegra_release")
    return [tegra.read_text(errors="replace").split(",")[0].strip("# ")] if tegra.exists() else []


def profile(config: AgentConfig) -> DeviceProfile:
    """The profile that the owner names, or the one that fits; the owner's budget and threads put in.
    Raises KeyError."""
    import msgspec

    seen = facts()
    found = (
        match(seen["machine"], seen["board"], seen["memory_mb"], seen["cores"])
        if config.profile == "auto"
        else library()[config.profile]
    )
    link = {k: v for k, v in (("up_kbps", config.link.up_kbps), ("down_kbps", config.link.down_kbps)) if v}
    return msgspec.structs.replace(
        found,
        model_budget_mb=config.model_budget_mb or found.model_budget_mb,
        threads=config.threads or found.threads,
        **link,
    )


def kernels_in_child(threads: int = 1, where: str = "auto", timeout_s: float = 180.0) -> dict[str, float]:
    """Milliseconds by `profiles.kernels.key`, measured in a child process; empty where torch is missing or
    the child fails."""
    command = [sys.executable, "-m", "rankfleet.edge_agent.machine.probe", str(threads), where]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=True)
        return {str(k): float(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return {}


def kernels(
    threads: int = 1, widths: Sequence[int] = WIDTHS, tokens: int = 256, where: str = "auto"
) -> dict[str, float]:
    """Median milliseconds of forward and input gradient through one frozen map (h → 4h), by bits of its
    weights and width h.

    8 and 4 bits are computed with in bf16 where that has just proved faster, as the worker does.
    """
    import torch

    from ..model.ops.quantise import use_bitsandbytes
    from .accelerator import accelerator

    torch.set_num_threads(threads)
    device = accelerator(where)
    use_bitsandbytes(device)
    found: dict[str, float] = {}
    for width in widths:
        weight = torch.randn(4 * width, width) / width**0.5
        for bits in (32, 16, 8, 4):
            kind = torch.bfloat16 if bits == 16 or (bits < 16 and half(found, width)) else torch.float32
            with contextlib.suppress(RuntimeError):  # no kernel for it here
                found[key(bits, width)] = _one(weight, bits, kind, tokens, 7 if width < 1000 else 3, device)
    return found


def _one(weight: Any, bits: int, kind: Any, tokens: int, repeats: int, device: Any) -> float:
    import torch

    from ..model.ops.adapted import Site, apply
    from ..model.ops.frozen import Frozen
    from .accelerator import wait

    out, in_ = weight.shape
    base, times = Frozen(out, in_, Frozen.pack(weight, bits)), []
    base.to(device)
    site = Site("probe", 0, base)
    for _ in range(repeats + 1):
        x = torch.randn(tokens, in_, dtype=kind, device=device, requires_grad=True)
        wait(device)
        start = time.perf_counter()
        torch.autograd.grad(apply(x, [site])[0].sum(), x)
        wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return round(sorted(times[1:])[repeats // 2], 3)


if __name__ == "__main__":
    print(
        json.dumps(
            kernels(
                int(sys.argv[1]) if len(sys.argv) > 1 else 1,
                where=sys.argv[2] if len(sys.argv) > 2 else "auto",
            )
        )
    )
