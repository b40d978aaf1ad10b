"""May this job run here? Asked before anything is downloaded; the owner's YAML answers."""

from fnmatch import fnmatch

from rankfleet.federated.errors import Refused
from rankfleet.federated.wire.messages import Assignment

from ..config import AgentConfig, Dataset


def check(job: Assignment, config: AgentConfig) -> tuple[Dataset, str]:
    """The dataset and the base model's folder that the job may use. Raises Refused with the reason."""
    allow = config.allow
    if not any(fnmatch(job.job, p) for p in allow.jobs):
        raise Refused(f"the owner does not allow job `{job.job}`; allowed are {', '.join(allow.jobs)}")
    if not any(fnmatch(job.model, p) for p in allow.models):
        raise Refused(f"the owner does not allow model `{job.model}`; allowed are {', '.join(allow.models)}")
    for item in job.stack:
        name = item if isinstance(item, str) else next(iter(item), "")
        if not any(fnmatch(name, p) for p in allow.methods):
            raise Refused(f"the owner does not allow method `{name}`; allowed are {', '.join(allow.methods)}")
    if job.task.dataset not in config.datasets:
        raise Refused(
            f"this device maps no dataset `{job.task.dataset}`; it has "
            f"{', '.join(config.datasets) or 'none'}",
            f"add `datasets.{job.task.dataset}` to the agent's YAML",
        )
    dataset = config.datasets[job.task.dataset]
    if dataset.task != job.task.kind:
        raise Refused(
            f"dataset `{job.task.dataset}` is for task `{dataset.task}`, the job is `{job.task.kind}`"
        )
    if job.model not in config.models:
        raise Refused(
            f"this device has no base model `{job.model}`; it has {', '.join(config.models) or 'none'}",
            f"add `models.{job.model}: FOLDER` to the agent's YAML",
        )
    return dataset, config.models[job.model]
