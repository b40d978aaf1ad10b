"""The base model's folder: one on this device, one of the hub, or fetched from the coordinator over HTTPS,
resumed where it stopped.

Standard library alone: the service downloads, the worker checks the digest of the whole model before it is
used.
"""

import contextlib
import hashlib
import json
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from rankfleet.federated.errors import Refused, WireError
from rankfleet.federated.program.files import digest_of_file, sync_folder
from rankfleet.federated.wire.messages import Assignment, ModelSource, model_ticket

from ..trust.identity import Identity

log = logging.getLogger(__name__)
TRIES = 8
BLOCK = 1 << 20
MAX_FILES = 500


class Bases:
    """Models that this device fetched, under `<state_dir>/models/<digest>/`."""

    def __init__(
        self,
        home: Path,
        who: Identity,
        limit_mb: float,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.home, self.who, self.limit_mb, self.progress = home / "models", who, limit_mb, progress
        self.resumed = 0

    def folder(self, job: Assignment, told: str) -> str:
        """Where the job's base model lies; blocks while it is fetched. Raises Refused or WireError."""
        if told.startswith("hub:"):
            return from_hub(told[4:], job.model)
        if told != "coordinator":
            return told
        target = self.home / job.model_digest
        if target.exists():
            return str(target)
        if job.source is None:
            raise Refused(
                f"the coordinator serves no files, and this device has no folder for `{job.model}`",
                "set `https: {models: true}` there",
            )
        self._fetch(job.source, job.model_digest, target)
        return str(target)

    def _fetch(self, source: ModelSource, digest: str, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        files = self._again(lambda: self._listed(source, digest))
        total = sum(f["size"] for f in files)
        if total > self.limit_mb * 1e6:
            raise Refused(
                f"the base model has {total / 1e6:,.0f} MB, this device allows {self.limit_mb:,.0f} MB",
                "raise `allow.model_mb`",
            )
        done = 0
        for f in files:
            path = part / f["name"]
            self._again(lambda f=f, path=path, done=done: self._file(source, digest, f, path, done, total))  # type: ignore[misc]
            done += f["size"]
        sync_folder(part)
        part.rename(target)
        sync_folder(target.parent)

    def _again(self, work: Callable[[], Any]) -> Any:
        """Until it succeeds, with growing pauses. Raises WireError in the end."""
        from http.client import HTTPException

        for attempt in range(TRIES):
            try:
                return work()
            except (OSError, HTTPException, ValueError) as error:
                last = error
                log.warning("the base model: %s; trying again", error)
                time.sleep(min(30.0, 0.2 * 2**attempt))
        raise WireError(
            f"the base model cannot be fetched: {last}", "is `https.advertise` reachable from here?"
        )

    def _ask(self, source: ModelSource, path: str, start: int = 0) -> tuple[Any, Any]:
        """A request with our ticket to the server whose certificate the assignment names: (connection,
        answer)."""
        from http.client import HTTPSConnection

        where = urlsplit(source.url)
        # The pin replaces authorities and names: it came in a signed assignment.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = HTTPSConnection(where.hostname or "", where.port or 443, timeout=30, context=context)
        connection.connect()
        shown = connection.sock.getpeercert(binary_form=True)
        if hashlib.sha256(shown or b"").hexdigest() != source.pin:
            connection.close()
            raise WireError(
                f"{source.url} shows another certificate than the assignment names",
                "somebody is in between, or it was renewed",
            )
        now = str(int(time.time()))
        headers = {
            "X-Rankfleet-Device": self.who.device,
            "X-Rankfleet-Time": now,
            "X-Rankfleet-Ticket": model_ticket(self.who.link_key, path, now),
        }
        if start:
            headers["Range"] = f"bytes={start}-"
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        if answer.status not in (200, 206):
            reason = answer.read(300).decode("utf-8", "replace")
            connection.close()
            raise WireError(f"the coordinator answers {answer.status}: {reason}")
        return connection, answer

    def _listed(self, source: ModelSource, digest: str) -> list[dict[str, Any]]:
        connection, answer = self._ask(source, f"/models/{digest}")
        with contextlib.closing(connection):
            found = json.loads(answer.read(1 << 20))
        names = [f["name"] for f in found]
        if len(names) > MAX_FILES or any("/" in n or "\\" in n or n.startswith(".") for n in names):
            raise WireError("the list of the model's files names paths that are not plain files")
        return [{"name": str(f["name"]), "size": int(f["size"]), "digest": str(f["digest"])} for f in found]

    def _file(
        self, source: ModelSource, digest: str, f: dict[str, Any], path: Path, done: int, total: int
    ) -> None:
        """One file, from where it stopped."""
        have = path.stat().st_size if path.exists() else 0
        if have > f["size"]:
            path.unlink()
            have = 0
        if have < f["size"]:
            self.resumed += have > 0
            connection, answer = self._ask(source, f"/models/{digest}/{quote(f['name'])}", have)
            with contextlib.closing(connection), path.open("ab" if answer.status == 206 else "wb") as file:
                have = have if answer.status == 206 else 0
                while block := answer.read(BLOCK):
                    file.write(block)
                    have += len(block)
                    self.progress(done + have, total)
        if digest_of_file(path) != f["digest"]:
            size = path.stat().st_size
            if size >= f["size"]:
                path.unlink()
            raise OSError(
                f"{f['name']} is not whole yet: {size:,} of {f['size']:,} bytes"
                if size < f["size"]
                else f"{f['name']} is damaged"
            )


def from_hub(repository: str, name: str) -> str:
    """The folder of a model of the hub. Raises Refused."""
    try:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                repository, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
            )
        )
    except Exception as error:
        raise Refused(f"model `{name}`: {repository} cannot be had from the hub: {error}") from None
