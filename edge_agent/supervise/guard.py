"""A good guest: training waits while the owner, the battery, the heat or the hour object, and goes on
where it was.

What objects is looked at twice a second. The worker is stopped at once, in the middle of a step; if that
lasts, or memory is short, it writes down where it is and leaves.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from ..guard_config import GuardConfig, span
from ..order import Order
from .process import EngineFailed, ProcessEngine, Progress

log = logging.getLogger(__name__)
LOOK_S = 0.5
PATIENCE_S = 300.0
"""A pause that lasts longer gives the memory back."""
SLOW_S = 30.0
"""What has to ask another program is asked this often."""


class Guard:
    """Says what objects, in words; nothing where training may go on."""

    def __init__(self, config: GuardConfig, now: Callable[[], datetime] = datetime.now) -> None:
        self.config, self.now = config, now
        self._hot = False
        self._metered = (0.0, False)
        self.worker: int | None = None
        """Process whose own use of the processor does not count."""

    def objects(self) -> str:
        """The first reason, or nothing."""
        return next(self._reasons(), "")

    def short_of_memory(self) -> bool:
        """Must memory be given back?"""
        return psutil.virtual_memory().available / 1e6 < self.config.min_free_mb

    def _reasons(self) -> Iterator[str]:
        c = self.config
        if c.hours and not self._in_hours():
            yield f"it is {self.now():%H:%M}, training is allowed {c.hours}"
        battery = battery_now()
        if battery is not None and not battery[1] and (battery[0] <= c.battery_percent):
            yield f"battery at {battery[0]:.0f}%, above {c.battery_percent:.0f}% is wanted"
        heat = celsius()
        limit = c.max_celsius - (5.0 if self._hot else 0.0)
        self._hot = heat is not None and heat > limit
        if self._hot:
            yield f"{heat:.0f} °C, {limit:.0f} are allowed"
        if self.short_of_memory():
            free = psutil.virtual_memory().available / 1e6
            yield f"{free:.0f} MB of memory are free, {c.min_free_mb:.0f} are left to others"
        if c.idle_s and (idle := user_idle_s()) < c.idle_s:
            yield f"somebody typed {idle:.0f} s ago"
        if c.busy_percent is not None and (busy := self._others()) > c.busy_percent:
            yield f"other programs take {busy:.0f}% of the processor"
        if not c.metered and self._on_meter():
            yield "the network is metered"

    def _in_hours(self) -> bool:
        begin, end = span(self.config.hours)
        minute = self.now().hour * 60 + self.now().minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def _others(self) -> float:
        """Share of the processor that is not ours, since the last look."""
        whole = psutil.cpu_percent()
        ours = 0.0
        with contextlib.suppress(psutil.Error):
            if self.worker is not None:
                ours = _process(self.worker).cpu_percent() / (os.cpu_count() or 1)
        return max(0.0, whole - ours)

    def _on_meter(self) -> bool:
        if time.monotonic() - self._metered[0] > SLOW_S or not self._metered[0]:
            self._metered = (time.monotonic(), metered())
        return self._metered[1]


_known: dict[int, psutil.Process] = {}


def _process(pid: int) -> psutil.Process:
    """The same object each time: it counts from one look to the next."""
    if pid not in _known:
        _known.clear()
        _known[pid] = psutil.Process(pid)
    return _known[pid]


def battery_now() -> tuple[float, bool] | None:
    """(percent, on mains); None without a battery."""
    try:
        found = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (OSError, RuntimeError):
        return None
    return None if found is None else (float(found.percent), bool(found.power_plugged))


def celsius() -> float | None:
    """The hottest sensor; boards without hwmon have thermal zones."""
    found: list[float] = []
    with contextlib.suppress(OSError, AttributeError):
        asked: Any = getattr(psutil, "sensors_temperatures", dict)  # not on every system
        found += [s.current for sensors in asked().values() for s in sensors if s.current]
    for zone in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    sane = [c for c in found if -20 < c < 130]
    return max(sane, default=None)


def user_idle_s() -> float:
    """Seconds since somebody typed on a terminal of this machine; very long where nobody is logged in."""
    touched = [0.0]
    with contextlib.suppress(OSError, RuntimeError):
        for user in psutil.users():
            with contextlib.suppress(OSError):
                touched.append(os.stat(f"/dev/{user.terminal}").st_atime if user.terminal else 0.0)
    return max(0.0, time.time() - max(touched))


def metered() -> bool:
    """Does NetworkManager call any connected device metered? No where it is not there."""
    import shutil
    import subprocess

    if (program := shutil.which("nmcli")) is None:
        return False
    try:
        done = subprocess.run(
            [program, "-g", "GENERAL.METERED", "device", "show"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return any(line.startswith("yes") for line in done.stdout.splitlines())


class GuardedEngine:
    """An engine that works while the guard lets it. `tell` is told what it waits for."""

    def __init__(
        self, engine: ProcessEngine, guard: Guard, tell: Callable[[str], None] = lambda why: None
    ) -> None:
        self.engine, self.guard, self.tell = engine, guard, tell
        self.pauses = 0
        self._sent_away = False

    async def run(self, order: Order, progress: Progress) -> None:
        """One order, with as many pauses as it takes. Raises EngineFailed."""
        while True:
            await self._allowed()
            watch = asyncio.create_task(self._watch(), name="guard")
            try:
                await self.engine.run(order, progress)
                return
            except EngineFailed as failed:
                if failed.code != "halted" or not self._sent_away:
                    raise  # somebody else ended it: its work is not wanted any more
                self._sent_away = False
            finally:
                watch.cancel()
                self.engine.resume()

    async def stop(self) -> None:
        """End whatever is running."""
        await self.engine.stop()

    async def _allowed(self) -> None:
        while why := self.guard.objects():
            self.tell(why)
            await asyncio.sleep(LOOK_S)
        self.tell("")

    async def _watch(self) -> None:
        """Stops the worker while something objects; sends it away if that lasts or memory is short."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.guard.worker = self.engine.pid
            why = self.guard.objects()
            if not why:
                continue
            self.pauses += 1
            log.info("training waits: %s", why)
            began = time.monotonic()
            self.engine.pause()
            while why := self.guard.objects():
                self.tell(why)
                if self.guard.short_of_memory() or time.monotonic() - began > PATIENCE_S:
                    self._sent_away = True
                    await self.engine.leave()
                    return
                await asyncio.sleep(LOOK_S)
            self.tell("")
            self.engine.resume()


def told(status: Any) -> Callable[[str], None]:
    """What it waits for, in the agent's status."""

    def tell(why: str) -> None:
        if status.get("waits_for", "") != why:
            status.set(waits_for=why)

    return tell
