"""Methods' memory of single devices, a file each: a round rewrites those that it changed, and none of the
others.

`<folder>/<method>/<device>@<version>` is the memory after the round that made that version. Files of
versions that were never recorded are passed over, so a round whose closing was cut off is closed again
from the same memory.
"""

from pathlib import Path
from typing import Any

from rankfleet.federated.contract.hook_errors import check_state
from rankfleet.federated.program.files import write_atomic
from rankfleet.federated.wire.frame import freeze, thaw

KEPT = 4
"""States of a device that stay on disk: of the versions that a job may go back to."""


class DeviceStates:
    """`of(method, device)` gives a dictionary; `keep(version)` writes down what was changed since `at`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        self._held: dict[tuple[str, str], tuple[dict[str, Any], bytes]] = {}

    def at(self, number: int) -> None:
        """Go on from the state of this version."""
        self._number = number
        self._held.clear()

    def of(self, method: str, device: str) -> dict[str, Any]:
        """What a method knows of a device."""
        key = (method, device)
        if key not in self._held:
            path = max(
                (p for p in self._files(method, device) if _version(p) <= self._number),
                default=None,
                key=_version,
            )
            data = path.read_bytes() if path else freeze({})
            self._held[key] = thaw(data), data
        return self._held[key][0]

    def keep(self, number: int) -> None:
        """Write down what changed, as of version `number`. Raises HookError for what cannot be written."""
        for (method, device), (state, before) in sorted(self._held.items()):
            check_state(method, "of", state)
            stale = [p for p in self._files(method, device) if _version(p) >= number]
            if (now := freeze(state)) != before:
                (self.folder / method).mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / method / f"{device}@{number:06d}", now)
            else:
                for path in stale:
                    path.unlink()
            for path in sorted(self._files(method, device), key=_version)[:-KEPT]:
                path.unlink()

    def _files(self, method: str, device: str) -> list[Path]:
        folder = self.folder / method
        return (
            [p for p in folder.iterdir() if p.name.rpartition("@")[0] == device and _version(p) >= 0]
            if folder.is_dir()
            else []
        )


def _version(path: Path) -> int:
    """The version of a file's name; -1 for one that is still being written."""
    number = path.name.rpartition("@")[2]
    return int(number) if number.isdecimal() and not path.name.startswith(".") else -1
