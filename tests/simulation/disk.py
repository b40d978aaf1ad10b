"""A disk that keeps after a power cut only what was synced, and may tear the rest.

The model is a journalling file system: a sync of any file or folder makes all earlier changes of names
durable, and the content of what was synced. At a cut the names go back to the last sync, or stay as they
are (the journal was quicker); content that was not synced is lost, torn or there, each by chance. SQLite
writes for itself and is taken at its word: a commit is durable.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Names = dict[str, int]
"""Path below the home → inode."""


class Disk:
    """The home of one node. `touched` is called before every sync and rename: a node can be killed there."""

    def __init__(self, home: Path, rng: random.Random) -> None:
        self.home, self.rng = home, rng
        self.names: Names = {}
        self.content: dict[int, bytes] = {}
        self.touched: Callable[[], None] = lambda: None
        self.full = False
        self.fills_in = 0
        """Syncs until it is full; 0: it does not fill up."""
        self.syncs = 0
        self.dead = False

    def holds(self, path: str) -> bool:
        """Is the path on this disk?"""
        return path == str(self.home) or path.startswith(f"{self.home}{os.sep}")

    def synced(self, path: str) -> None:
        """A file or a folder was synced."""
        if self.dead:
            return
        self.syncs += 1
        if os.path.isfile(path):
            self.content[os.stat(path).st_ino] = Path(path).read_bytes()
        self.names = self.now()
        alive = set(self.names.values())
        self.content = {i: data for i, data in self.content.items() if i in alive}

    def now(self) -> Names:
        """All names, as the running system sees them."""
        found: Names = {}
        for folder, _, files in os.walk(self.home):
            found[os.path.relpath(folder, self.home) + os.sep] = 0
            for name in files:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, self.home)] = os.lstat(path).st_ino
        return found

    def image(self, target: Path, power: bool) -> None:
        """What the next life finds, written to `target`: all of it after a kill, what survived after a
        power cut."""
        here = self.now()
        by_inode = {i: self.home / name for name, i in here.items() if i}
        names = (
            here
            if not power or self.rng.random() < 0.5
            else self.names | {n: i for n, i in here.items() if n.startswith("ledger.db")}
        )
        target.mkdir()
        for name in sorted(n for n in names if n.endswith(os.sep)):
            (target / name).mkdir(parents=True, exist_ok=True)
        for name, inode in sorted(names.items()):
            if name.endswith(os.sep):
                continue
            path = by_inode.get(inode)
            if path is not None and path.is_symlink():
                (target / name).symlink_to(os.readlink(path))
                continue
            live = path.read_bytes() if path is not None else None
            (target / name).write_bytes(
                live or b"" if not power or name.startswith("ledger.db") else self._survives(inode, live)
            )

    def _survives(self, inode: int, live: bytes | None) -> bytes:
        durable = self.content.get(inode)
        if live is None or live == durable:
            return durable or b""
        fate = self.rng.random()
        if fate < 0.4:
            return durable or b""
        return live if fate < 0.6 else live[: self.rng.randrange(len(live) + 1)]

    def restore(self, image: Path) -> None:
        """The next life begins."""
        shutil.rmtree(self.home)
        image.rename(self.home)
        self.content.clear()
        for name, inode in self.now().items():
            if inode and not (self.home / name).is_symlink():
                self.content[inode] = (self.home / name).read_bytes()
        self.names, self.full, self.fills_in, self.dead = self.now(), False, 0, False


@contextmanager
def attached(disks: list[Disk]) -> Iterator[None]:
    """Syncs, renames and writes of this process go over the disks that hold their paths."""
    fsync, replace = os.fsync, os.replace

    def disk_of(path: str) -> Disk | None:
        return next((d for d in disks if d.holds(path)), None)

    def our_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        disk = disk_of(path)
        if disk is None:
            fsync(descriptor)
            return
        disk.touched()
        if disk.fills_in:
            disk.fills_in -= 1
            disk.full = disk.full or not disk.fills_in
        if disk.full:
            raise OSError(28, "No space left on device")
        disk.synced(path)

    def our_replace(source: "os.PathLike[str] | str", target: "os.PathLike[str] | str") -> None:
        disk = disk_of(os.fspath(target))
        if disk is not None:
            disk.touched()
        replace(source, target)

    os.fsync, os.replace = our_fsync, our_replace
    try:
        yield
    finally:
        os.fsync, os.replace = fsync, replace
