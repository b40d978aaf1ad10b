"""A job that goes on from another one's adapter (`start: JOB`), or begins beside it (`frozen: true`)."""

from typing import TYPE_CHECKING

import numpy as np

from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError

from ..aggregate.combine import carried
from ..planning.views import grow
from ..store.versions import Registry, Version

if TYPE_CHECKING:
    from .run import JobRunner


def start_from(run: "JobRunner", first: Version, job: str) -> None:
    """Another job's newest version into the first one of this: as the start, or frozen beside it. Raises
    ConfigError."""
    other = Registry(run.home / "jobs" / job)
    numbers = [int(p.name[1:]) for p in other.folder.glob("v??????")]
    if not numbers:
        raise ConfigError(f"start: job `{job}` has no version to go on from", "coordinator jobs")
    last = other.load(max(numbers))
    if strange := sorted(m for m, p in last.pairs.items() if m not in first.pairs and np.any(p.B)):
        raise ConfigError(
            f"start: job `{job}` adapts `{strange[0]}`, which this one does not",
            "use the same model and targets",
        )
    first.dense |= {
        k: t for k, t in last.dense.items() if k in first.dense and first.dense[k].shape == t.shape
    }
    first.carry = dict(last.carry)
    if run.plan.spec.frozen:
        scale = run.plan.spec.adapter.scale
        first.carry = carried(first.carry, {m: LowRank(scale * p.B, p.A) for m, p in last.pairs.items()})
    else:
        first.pairs |= {
            m: grow(p, first.pairs[m].A.shape[0]) for m, p in last.pairs.items() if m in first.pairs
        }
