"""A coordinator in one file, and back again on any host and database: ledger, keys, authority, roster,
versions, updates.

A restored coordinator is in an earlier state than its devices. It begins a new epoch: devices forget what
they did in rounds that it does not know of, and take part again.
"""

import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import msgspec

from rankfleet.federated.errors import ConfigError

from ..config import CoordinatorConfig
from .database import url_of
from .ledger import Ledger

LEDGER = "ledger.msgpack"
LEFT_OUT = ("ledger.db", "api.json", "spool", "broker.pid", "mosquitto.conf", "mosquitto.acl")
FORMAT = 1


def backup(config: CoordinatorConfig, target: Path) -> dict[str, int]:
    """Write everything to `target`, readable by its owner alone; the service may run. Returns what is in
    it."""
    if not config.home.is_dir():
        raise ConfigError(f"{config.home} does not exist", "is this the coordinator's machine, and its YAML?")
    ledger = Ledger(url_of(config))
    try:
        # The ledger first: files that its rows name are written before them, and stay for three versions.
        rows = ledger.everything()
    finally:
        ledger.close()
    part = target.with_name(f".{target.name}.new")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    files = 0
    with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        about = {"format": FORMAT, "fleet": config.fleet, "at": time.time()}
        for name, data in (
            ("about.json", json.dumps(about).encode()),
            (LEDGER, msgspec.msgpack.encode(rows)),
        ):
            _add(tar, name, data, 0o600)
        for path in sorted(p for p in config.home.rglob("*") if p.is_file() and not p.is_symlink()):
            name = str(path.relative_to(config.home))
            if not name.startswith(LEFT_OUT) and not path.name.startswith("."):
                try:
                    _add(tar, f"home/{name}", path.read_bytes(), path.stat().st_mode & 0o777)
                except FileNotFoundError:
                    continue  # a version that became too old meanwhile
                files += 1
    os.replace(part, target)
    return {"rows": sum(len(r) for r in rows.values()), "files": files, "bytes": target.stat().st_size}


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), mode, int(time.time())
    tar.addfile(entry, io.BytesIO(data))


def restore(config: CoordinatorConfig, source: Path) -> dict[str, int]:
    """Fill an empty data directory and an empty database from a backup. Raises ConfigError where they are
    not empty."""
    home = config.home
    if home.exists() and any(home.iterdir()):
        raise ConfigError(f"{home} is not empty", "restore into a new `data_dir`")
    try:
        with tarfile.open(source, "r:gz") as tar:
            about = json.loads(_read(tar, "about.json"))
            if about["format"] != FORMAT or about["fleet"] != config.fleet:
                raise ConfigError(
                    f"{source} is of fleet `{about['fleet']}` in format {about['format']}",
                    f"this is fleet `{config.fleet}`",
                )
            rows = msgspec.msgpack.decode(_read(tar, LEDGER))
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            files = sum(
                _put(tar, entry, home) for entry in tar.getmembers() if entry.name.startswith("home/")
            )
    except (OSError, KeyError, ValueError, tarfile.TarError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{source}: {error}", "is it a file that `coordinator backup` wrote?") from None
    return {"rows": _fill(config, rows), "files": files}


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    found = tar.extractfile(name)
    if found is None:
        raise ValueError(f"it holds no {name}")
    return found.read()


def _put(tar: tarfile.TarFile, entry: tarfile.TarInfo, home: Path) -> int:
    path = home / entry.name.removeprefix("home/")
    if not entry.isfile() or ".." in Path(entry.name).parts or not path.is_relative_to(home):
        raise ValueError(f"it holds {entry.name!r}, which is no file of a data directory")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, entry.mode & 0o700)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_read(tar, entry.name))
        file.flush()
        os.fsync(file.fileno())
    return 1


def _fill(config: CoordinatorConfig, rows: dict[str, list[dict[str, Any]]]) -> int:
    ledger = Ledger(url_of(config))
    try:
        if ledger.jobs() or ledger.device_rows():
            raise ConfigError("the database is not empty", "restore into a new one")
        ledger.fill(rows)
        old = next((int(r["value"]) for r in rows.get("facts", []) if r["name"] == "epoch"), 0)
        ledger.set_epoch(max(old + 1, int(time.time())))
        return sum(len(r) for r in rows.values())
    finally:
        ledger.close()
