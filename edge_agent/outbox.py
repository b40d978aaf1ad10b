"""Updates that wait for the coordinator's receipt, and the bytes that they cost. All on disk, all safe against a kill."""

import shutil
from pathlib import Path

import msgspec

from federated.files import write_atomic

from .order import Meta, read_update, state_file, update_file


class Outbox:
    """Finished rounds under `<state_dir>/jobs/<job>/`; one is due while its update is there."""

    def __init__(self, home: Path) -> None:
        self.jobs = home / "jobs"
        self._sound: dict[Path, Meta] = {}
        """Results whose bytes were checked in this life of the service."""

    def due(self) -> list[tuple[Path, Meta]]:
        """Results without a receipt, oldest first. A damaged one is removed: it will be trained again."""
        found = []
        for file in sorted(self.jobs.glob("*/r??????.update")):
            result = file.with_suffix("")
            if result not in self._sound:
                if not self.finished(result):
                    continue
                try:
                    self._sound[result] = read_update(file)[0]
                except (OSError, msgspec.MsgspecError):
                    file.unlink(missing_ok=True)
                    state_file(result).unlink(missing_ok=True)
                    continue
            found.append((result, self._sound[result]))
        return found

    def finished(self, result: Path) -> bool:
        """Was this round trained here already?"""
        return state_file(result).exists()

    def drop(self, result: Path) -> None:
        """The coordinator has it: the update goes, state stays for the next round, that of older rounds goes."""
        update_file(result).unlink(missing_ok=True)
        self._sound.pop(result, None)
        for old in result.parent.glob("r??????.state"):
            if old.name < result.name and not old.with_suffix(".update").exists():
                old.unlink(missing_ok=True)

    def forget(self, job: str) -> None:
        """A job has ended for good: nothing of it stays."""
        shutil.rmtree(self.jobs / job, ignore_errors=True)
        self._sound = {f: m for f, m in self._sound.items() if m.job != job}


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
        """Safe against a kill; a power cut may lose the last minute's count."""
        write_atomic(path, msgspec.json.encode(self), durable=False)
