"""Files that survive a power cut: write beside, fsync, rename, fsync the folder."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

CANNOT = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)
"""What file systems say that do not sync folders."""


def write_atomic(path: Path, data: bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Replace `path` by `data`; after a crash it holds the old content or the new one, never a mixture.

    Without `durable` that holds for a crash of the program alone, at the price of a plain write: for what
    can be had again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_in_order(files: dict[Path, bytes]) -> None:
    """Replace several files of one folder: each is whole, and a later one is never there without the
    earlier ones.

    Journalling file systems keep the order of renames within a folder, so one sync of the folder at the
    end is enough.
    """
    parts = []
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts.append((path.with_name(f".{path.name}.{os.getpid()}.new"), path))
        with parts[-1][0].open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    for part, path in parts:
        os.replace(part, path)
    sync_folder(parts[-1][1].parent)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replace `folder` by one with these files, whole or not at all, as durable as `write_atomic`."""
    part = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, data in files.items():
        with (part / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    sync_folder(folder.parent)


def sync_files(paths: list[Path]) -> None:
    """Bring files that were just written to disk, and their names."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in {p.parent for p in paths}:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can sync folders at all. Raises OSError where the
    disk fails or is full."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(descriptor)


def digest_of(data: bytes) -> str:
    """SHA-256, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _pieces(file)
        )


def _pieces(file: object) -> str:
    whole = hashlib.sha256()
    while piece := file.read(1 << 20):  # type: ignore[attr-defined]
        whole.update(piece)
    return whole.hexdigest()
