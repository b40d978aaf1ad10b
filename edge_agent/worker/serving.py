"""The adapter that applications use: peft's format under `<state_dir>/adapter/`, `current` always a whole
one."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from rankfleet.federated.contract.method import Method
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.peft_format import write_adapter
from rankfleet.federated.wire.messages import Assignment

if TYPE_CHECKING:
    from .view import View


def publish(
    home: Path,
    job: Assignment,
    view: "View",
    tensors: Tensors,
    transposed: bool = False,
    attached: Mapping[str, Method] | None = None,
) -> None:
    """Write version `job.version` and let `current` point to it; older ones go, but for the last two.

    `tensors`: what the model computes with, after `express`. `attached`: methods with functions in the
    model, which `infer` puts there again.
    """
    folder = home / "adapter" / f"{job.job}-v{job.version:06d}"
    pairs = {name: _pair(view, name, tensors) for name in view.spec.pairs}
    pairs = {name: p for name, p in pairs.items() if len(p.A)} or {
        name: _nothing(p) for name, p in list(pairs.items())[:1]
    }
    scale = next((p.scale for p in view.spec.pairs.values()), 1.0)
    task = {
        **msgspec.to_builtins(job.task),
        "version": job.version,
        "base_digest": job.model_digest,
        "bits": job.recipe.bits,
    }
    if attached:
        task |= {
            "attach": [{n: msgspec.to_builtins(m)} for n, m in attached.items()],
            "spec": msgspec.to_builtins(view.spec),
        }
    write_adapter(
        folder,
        pairs,
        {k: tensors[k] for k in view.spec.dense},
        scale=scale,
        base=job.model,
        task=task,
        transposed=transposed,
    )
    point(home / "adapter" / "current", folder)
    for old in sorted(p for p in (home / "adapter").glob("*-v??????") if p != folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def _pair(view: "View", name: str, tensors: Tensors) -> LowRank:
    """A map's pair in canonical coordinates, its carry as further rank."""
    pair, own_b, own_a = view.spec.pairs[name], tensors[f"{name}.B"], tensors[f"{name}.A"]
    b = np.zeros((pair.out, own_b.shape[1]), np.float32)
    a = np.zeros((own_a.shape[0], pair.in_), np.float32)
    b[view.masks.get(f"{name}.out", slice(None))] = own_b
    a[:, view.masks.get(f"{name}.in", slice(None))] = own_a
    if (carry := view.carry.get(name)) is not None:
        b, a = np.concatenate([b, carry.B / pair.scale], axis=1), np.concatenate([a, carry.A], axis=0)
    return LowRank(b, a)


def _nothing(pair: LowRank) -> LowRank:
    """A pair of rank 1 that changes nothing: peft's files need one."""
    return LowRank(np.zeros((len(pair.B), 1), np.float32), np.zeros((1, pair.A.shape[1]), np.float32))


def point(link: Path, folder: Path) -> None:
    """Let `link` name `folder`, in one step; a file with its name where the system has no symbolic links
    for us."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(folder.name)
    except OSError:
        new.write_text(folder.name, encoding="utf-8")
    os.replace(new, link)
