"""Updates that wait for the coordinator's receipt, and the bytes that they cost. All on disk, all safe
against a kill."""

import contextlib
import os
import shutil
from pathlib import Path

import msgspec

from rankfleet.federated.program.files import write_atomic

from ..order import Meta, read_meta, read_update, state_file, update_file

EPOCH = "epoch"
ENDED, REMEMBERED = "ended.json", 200
"""Names of jobs that ended here, the last so many."""


class Outbox:
    """Finished rounds under `<state_dir>/jobs/<job>/`; one is due while its update is there."""

    def __init__(self, home: Path) -> None:
        self.jobs = home / "jobs"
        self._due: dict[Path, Meta] | None = None
        """What is due, once the folder has been looked through; kept up to date from then on."""
        self._over: list[str] | None = None

    def due(self) -> list[tuple[Path, Meta]]:
        """Results without a receipt, oldest first. One whose head is damaged is removed: it will be
        trained again."""
        if self._due is None:
            self._due = {}
            for file in self.jobs.glob("*/r??????.update"):
                self.add(file.with_suffix(""))
        return sorted(self._due.items(), key=lambda item: str(item[0]))

    def add(self, result: Path) -> None:
        """A round was finished here, in this life of the service or an earlier one."""
        if self._due is None:
            self.due()
            return
        if not self.finished(result):
            return
        try:
            self._due[result] = read_meta(update_file(result))
        except (OSError, msgspec.MsgspecError):
            self._damaged(result)

    def read(self, result: Path) -> bytes | None:
        """The update, whole and as it was signed; None where it is damaged: then it is removed, and will
        be trained again."""
        try:
            return read_update(update_file(result))[1]
        except (OSError, msgspec.MsgspecError):
            self._damaged(result)
            return None

    def _damaged(self, result: Path) -> None:
        update_file(result).unlink(missing_ok=True)
        state_file(result).unlink(missing_ok=True)
        if self._due is not None:
            self._due.pop(result, None)

    def finished(self, result: Path) -> bool:
        """Was this round trained here already?"""
        return state_file(result).exists()

    def overtaken(self, result: Path) -> bool:
        """Was a later round of this job finished here?"""
        return any(p.name > state_file(result).name for p in result.parent.glob("r??????.state"))

    def drop(self, result: Path) -> None:
        """The coordinator has it: the update goes, state stays for the next round, that of older rounds
        goes."""
        update_file(result).unlink(missing_ok=True)
        if self._due is not None:
            self._due.pop(result, None)
        names = set(os.listdir(result.parent)) if result.parent.exists() else set()
        for name in names:
            old = name.removesuffix(".state")
            if name.endswith(".state") and old < result.name and f"{old}.update" not in names:
                (result.parent / name).unlink(missing_ok=True)

    def over(self, job: str) -> bool:
        """Has this job ended? What a broker kept of it must not be begun again."""
        return job in self._ended()

    def _ended(self) -> list[str]:
        if self._over is None:
            try:
                self._over = msgspec.json.decode((self.jobs / ENDED).read_bytes(), type=list[str])
            except (OSError, msgspec.MsgspecError):
                self._over = []
        return self._over

    def begin(self, epoch: int) -> bool:
        """The coordinator's epoch as an assignment names it. False where a later one was seen: the message
        is from a past life.

        A new one means that the coordinator was put back: what was done here in rounds that it does not
        know is void.
        """
        known = self._known_epoch()
        if epoch < known:
            return False
        if epoch > known:
            if known:
                shutil.rmtree(self.jobs, ignore_errors=True)
                self._due, self._over = None, None
            write_atomic(self.jobs.parent / EPOCH, str(epoch).encode())
        return True

    def _known_epoch(self) -> int:
        try:
            return int((self.jobs.parent / EPOCH).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def forget(self, job: str) -> None:
        """A job has ended for good: nothing of it stays but its name."""
        if not self.over(job):
            self._over = [*self._ended(), job][-REMEMBERED:]
            with contextlib.suppress(
                OSError
            ):  # on a full disk it is forgotten with the next start, and nothing else is lost
                write_atomic(self.jobs / ENDED, msgspec.json.encode(self._over))
        shutil.rmtree(self.jobs / job, ignore_errors=True)
        if self._due is not None:
            self._due = {f: m for f, m in self._due.items() if m.job != job}
