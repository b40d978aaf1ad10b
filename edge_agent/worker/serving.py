"""The adapter that applications use: peft's format under `<state_dir>/adapter/`, `current` always a whole one."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.peft_format import write_adapter
from rankfleet.federated.wire.messages import Assignment

if TYPE_CHECKING:
    from .view import View


def publish(home: Path, job: Assignment, view: "View", tensors: Tensors, transposed: bool = False) -> None:
    """Write version `job.version` and let `current` point to it; older ones go, but for the last two."""
    folder = home / "adapter" / f"{job.job}-v{job.version:06d}"
    pairs = {}
    for name, pair in view.spec.pairs.items():
        b = np.zeros((pair.out, pair.rank), np.float32)
        a = np.zeros((pair.rank, pair.in_), np.float32)
        b[view.masks.get(f"{name}.out", slice(None))] = tensors[f"{name}.B"]
        a[:, view.masks.get(f"{name}.in", slice(None))] = tensors[f"{name}.A"]
        pairs[name] = LowRank(b, a)
    scale = next((p.scale for p in view.spec.pairs.values()), 1.0)
    told = {"version": job.version, "base_digest": job.model_digest, "bits": job.recipe.bits}
    task = {**msgspec.to_builtins(job.task), **told}
    write_adapter(folder, pairs, {k: tensors[k] for k in view.spec.dense}, scale=scale, base=job.model, task=task, transposed=transposed)
    point(home / "adapter" / "current", folder)
    for old in sorted(p for p in (home / "adapter").glob("*-v??????") if p != folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def point(link: Path, folder: Path) -> None:
    """Let `link` name `folder`, in one step; a file with its name where the system has no symbolic links for us."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(folder.name)
    except OSError:
        new.write_text(folder.name, encoding="utf-8")
    os.replace(new, link)
