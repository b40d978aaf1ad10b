"""Prepared bases on disk: cut and packed once, mapped by every later round, checked, and whole or absent
after a power cut.

A folder per digest of (model, kept rows and columns, bits): a safetensors file for each layer, one for the
tables, and a list of their digests that is written last. What does not match its digest is made again.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rankfleet.federated.program.files import digest_of_file, sync_folder, write_atomic

from .load import Packed, Recipe

log = logging.getLogger(__name__)
FORMAT = 1
LIST = "list.json"


def key(recipe: Recipe, digest: str) -> str:
    """The digest of what is prepared."""
    whole = hashlib.sha256(f"{FORMAT} {digest} {recipe.bits} {recipe.head}".encode())
    for name, kept in sorted(recipe.masks.items()):
        whole.update(name.encode() + b"\0" + kept.astype("<i8").tobytes())
    return whole.hexdigest()[:32]


def needed(recipe: Recipe) -> bool:
    """Is anything changed? An fp32 checkpoint that is used as it is, is mapped itself."""
    if recipe.bits < 32 or recipe.masks or recipe.kind.transposed:
        return True
    first = recipe.source.get(recipe.name("q") + ".weight")
    return first.dtype != torch.float32


class Shelf:
    """The folder of prepared bases: at most `quota_mb` of them, of which `writes_mb` may be written now.
    `written` counts bytes."""

    def __init__(self, folder: Path, quota_mb: float, writes_mb: float = math.inf) -> None:
        self.folder, self.quota_mb, self.writes_mb, self.written = folder, quota_mb, writes_mb, 0

    def open(self, recipe: Recipe, digest: str) -> tuple[list[Callable[[], Packed]], Callable[[], Packed]]:
        """Layers (each read when it is called for) and tables. Made if they are not there. Raises OSError
        where there is no room."""
        target = self.folder / key(recipe, digest)
        if not self._whole(target):
            shutil.rmtree(target, ignore_errors=True)
            self._check_room(recipe)
            self._make(recipe, target)
        os.utime(target)

        def layer(number: int) -> Packed:
            found: Packed = load_file(target / _file(number))
            return found

        rest: Callable[[], Packed] = lambda: load_file(target / "rest.safetensors")  # noqa: E731
        return [lambda n=n: layer(n) for n in range(recipe.kind.layers)], rest  # type: ignore[misc]

    def _whole(self, target: Path) -> bool:
        """Is everything there, and as it was written?"""
        try:
            listed = json.loads((target / LIST).read_text(encoding="utf-8"))
            wrong = [name for name, digest in listed.items() if digest_of_file(target / name) != digest]
        except (OSError, ValueError, AttributeError):
            return False
        if wrong:
            log.warning("%s: %s is damaged; the base is prepared again", target, ", ".join(wrong))
        return not wrong

    def _check_room(self, recipe: Recipe) -> None:
        """Before anything is written: all layers are as large as the first, or smaller."""
        need = (recipe.kind.layers * _size(recipe.layer(0)) + _size(recipe.rest())) / 1e6
        if need > (most := min(self.quota_mb, self.writes_mb)):
            raise OSError(f"it would take {need:.0f} MB, {most:.0f} may be written")

    def _make(self, recipe: Recipe, target: Path) -> None:
        target.mkdir(parents=True)
        listed = {}
        try:
            for name, packed in [
                *((_file(n), n) for n in range(recipe.kind.layers)),
                ("rest.safetensors", None),
            ]:
                path = target / name
                save_file(
                    {
                        k: t.contiguous()
                        for k, t in (recipe.rest() if packed is None else recipe.layer(packed)).items()
                    },
                    path,
                )
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
                self.written += path.stat().st_size
                listed[name] = digest_of_file(path)
            sync_folder(target)
            write_atomic(target / LIST, json.dumps(listed).encode())
        except OSError:
            shutil.rmtree(target, ignore_errors=True)
            raise
        self._evict(target)

    def _evict(self, newest: Path) -> None:
        """The least recently used ones go, until the rest fits."""
        total = 0.0
        for folder in sorted(
            (p for p in self.folder.iterdir() if p.is_dir()), key=lambda p: (p != newest, -p.stat().st_mtime)
        ):
            total += sum(f.stat().st_size for f in folder.iterdir()) / 1e6
            if folder != newest and total > self.quota_mb:
                shutil.rmtree(folder, ignore_errors=True)


def _size(packed: Packed) -> int:
    return sum(t.numel() * t.element_size() for t in packed.values())


def _file(number: int) -> str:
    return f"layer-{number:03d}.safetensors"
