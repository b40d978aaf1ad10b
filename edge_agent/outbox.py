"""Updates that wait for the coordinator's receipt, and the bytes that they cost. All on disk, all safe against a kill."""

import shutil
from pathlib import Path

import msgspec

from federated.files import digest_of, write_atomic

from .order import Meta, read_meta


class Outbox:
    """Finished rounds under `<state_dir>/jobs/<job>/r<round>/`; one is due while its `update` file is there."""

    def __init__(self, home: Path) -> None:
        self.jobs = home / "jobs"

    def due(self) -> list[tuple[Path, Meta]]:
        """Results without a receipt, oldest first. A damaged one is removed: it will be trained again."""
        found = []
        for folder in sorted(self.jobs.glob("*/r??????")):
            if not (folder / "update").exists():
                continue
            try:
                meta = read_meta(folder)
                if digest_of((folder / "update").read_bytes()) != meta.blob.digest:
                    raise OSError("digest differs")
            except (OSError, msgspec.MsgspecError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            found.append((folder, meta))
        return found

    def finished(self, folder: Path) -> bool:
        """Was this round trained here already?"""
        return (folder / "meta.json").exists()

    def drop(self, folder: Path) -> None:
        """The coordinator has it: the update goes, state stays for the next round, older rounds go altogether."""
        (folder / "update").unlink(missing_ok=True)
        for old in folder.parent.glob("r??????"):
            if old.name < folder.name and not (old / "update").exists():
                shutil.rmtree(old, ignore_errors=True)

    def forget(self, job: str) -> None:
        """A job has ended for good: nothing of it stays."""
        shutil.rmtree(self.jobs / job, ignore_errors=True)


class Counters(msgspec.Struct):
    """Bytes of MQTT payload since enrolment, and today's."""

    up: int = 0
    down: int = 0
    day: str = ""
    today: int = 0
    jobs_done: int = 0
    done_at: float = 0.0

    @staticmethod
    def load(path: Path) -> "Counters":
        """From disk; zeros where there is nothing readable."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=Counters)
        except (OSError, msgspec.MsgspecError):
            return Counters()

    def save(self, path: Path) -> None:
        """Atomically."""
        write_atomic(path, msgspec.json.encode(self))
