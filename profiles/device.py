"""Device profiles: YAML files with what the planner must know of a kind of device, and how to recognise
one."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

Positive = Annotated[float, Meta(gt=0)]
FOLDER = Path(__file__).parent / "devices"
SOURCES = ("measured", "datasheet", "paper", "memory")


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to recognise the device: all that is given must hold."""

    machine: str = ""
    """`platform.machine()`, such as `aarch64`."""
    board: str = ""
    """Regular expression searched in the board's model string (`/proc/device-tree/model`)."""
    memory_gb: tuple[float, float] | None = None
    """Total memory lies between these."""


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kind of device. Rates are what a training step sees, not peaks of a data sheet."""

    name: str
    title: str
    cores: Annotated[int, Meta(ge=1)]
    threads: Annotated[int, Meta(ge=1)] = 1
    memory_mb: Positive
    gpu: str = ""
    gflops: dict[str, Positive]
    """Achieved GFLOP/s by bits of the base weights: `32`, `16`, `8`, `4`."""
    memory_gbps: Positive
    up_kbps: Positive
    down_kbps: Positive
    idle_w: Positive
    busy_w: Positive
    overhead_s: Annotated[float, Meta(ge=0)] = 1.0
    """Fixed time of a round on the device: waking the worker, reading the view."""
    step_overhead_ms: Annotated[float, Meta(ge=0)] = 5.0
    model_budget_mb: Positive | None = None
    """What the owner allows for weights and activations; None: 60% of the memory."""
    match: Match = Match()
    source: dict[str, str] = {}
    """Where a figure comes from: measured, datasheet, paper or memory."""

    @property
    def budget_mb(self) -> float:
        """Memory for weights, activations and the adapter's state."""
        return self.model_budget_mb or 0.6 * self.memory_mb


@cache
def library() -> dict[str, DeviceProfile]:
    """The profiles that come with the product, by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        profile = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), DeviceProfile)
        if profile.name != path.stem:
            raise ValueError(f"{path}: the profile is named `{profile.name}`")
        found[profile.name] = profile
    return found


def match(machine: str, board: str, memory_mb: float, cores: int) -> DeviceProfile:
    """The library's profile for what a probe saw; a generic one of the same size where none fits."""
    for profile in library().values():
        rule = profile.match
        if rule == Match():
            continue
        low, high = rule.memory_gb or (0.0, float("inf"))
        if (
            (not rule.machine or rule.machine == machine)
            and (not rule.board or re.search(rule.board, board))
            and low <= memory_mb / 1024 <= high
        ):
            return profile
    return generic(machine, memory_mb, cores)


def generic(machine: str, memory_mb: float, cores: int) -> DeviceProfile:
    """A cautious profile for an unknown device; the tuner corrects it from the first round on."""
    return DeviceProfile(
        name="generic",
        title=f"unknown {machine or 'machine'} with {cores} cores",
        cores=cores,
        threads=max(1, cores // 2),
        memory_mb=memory_mb,
        gflops={"32": 6.0 * cores, "16": 4.0 * cores, "8": 4.0 * cores, "4": 3.0 * cores},
        memory_gbps=8.0,
        up_kbps=2000,
        down_kbps=8000,
        idle_w=5,
        busy_w=15,
        source={"gflops": "memory"},
    )
