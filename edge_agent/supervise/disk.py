"""Kind to cards: how much training may write today, and whether this disk is one that writing wears out."""

import json
import os
import sys
import time
from pathlib import Path

from rankfleet.federated.program.files import write_atomic

from ..config import Disk

BLOCK = Path("/sys/dev/block")


def removable(path: Path) -> bool:
    """Does the path lie on an SD card or a USB stick? No where the system does not say."""
    if sys.platform != "linux":
        return False
    try:
        device = os.stat(path).st_dev
        found = (BLOCK / f"{os.major(device)}:{os.minor(device)}").resolve()
    except (OSError, AttributeError):
        return False
    for folder in (found, found.parent):
        try:
            if (folder / "removable").read_text().strip() == "1":
                return True
            if (folder / "device" / "type").read_text().strip() == "SD":
                return True
        except OSError:
            continue
    return False


class Writes:
    """MB that training wrote to this disk today and since enrolment; kept over restarts."""

    def __init__(self, home: Path, config: Disk) -> None:
        self.home, self.config, self.file = home, config, home / "disk.json"
        self.card = removable(home)
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            self.day, self.today, self.total = str(kept["day"]), float(kept["today"]), float(kept["total"])
        except (OSError, ValueError, KeyError, TypeError):
            self.day, self.today, self.total = "", 0.0, 0.0

    def add(self, mb: float) -> None:
        """A round wrote so much."""
        self._turn()
        if mb > 0:
            self.today, self.total = self.today + mb, self.total + mb
            told = {"day": self.day, "today": round(self.today, 3), "total": round(self.total, 3)}
            write_atomic(self.file, json.dumps(told).encode(), durable=False)

    def left_mb(self) -> float:
        """What may be written today."""
        self._turn()
        return max(0.0, self.config.writes_mb_per_day - self.today)

    def room(self, free_mb: float) -> tuple[float, float]:
        """(MB for prepared bases, MB for layers' output): inside the quota, today's writes and half of
        what is free."""
        room = min(self.config.quota_mb, free_mb / 2)
        cache = self.config.cache == "on" or (self.config.cache == "auto" and not self.card)
        return room, min(room, self.left_mb()) if cache else 0.0

    def _turn(self) -> None:
        today = time.strftime("%Y-%m-%d")
        if today != self.day:
            self.day, self.today = today, 0.0
