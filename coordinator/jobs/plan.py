"""A validated job with everything that follows from it: stack, modules, heads, policy, floor."""

import msgspec

from rankfleet.bandit import policies
from rankfleet.bandit.arms import expand, targets
from rankfleet.bandit.policy import Policy
from rankfleet.federated.contract.catalogue import build_stack
from rankfleet.federated.contract.stack import Stack
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.tasks import head_shapes, task_kind
from rankfleet.federated.wire.messages import Task
from rankfleet.profiles.card import ModelCard, Module

from .spec import JobSpec, PolicySpec


class Plan:
    """A validated job with everything that follows from it."""

    def __init__(self, spec: JobSpec, card: ModelCard) -> None:
        self.spec, self.card = spec, card
        self.stack = Stack(build_stack(list(spec.stack)), spec.space)
        self.modules: list[Module] = targets(card, list(spec.adapter.targets))
        if not self.modules:
            raise ConfigError(
                f"no module of `{card.name}` ends with {', '.join(spec.adapter.targets)}",
                f"its modules are {', '.join(sorted({m.name.rpartition('.')[2] for m in card.modules}))}",
            )
        self.max_depth = min(card.layers, spec.adapter.max_depth or max(1, card.layers // 2))
        self.heads = head_shapes(spec.task.kind, len(spec.task.labels), card.hidden)
        self.head_size = sum(_product(s) for s in self.heads.values())
        self.policy = _policy(spec.policy)
        self._check_arms()
        if self.stack.plain and spec.training.optimizer == "adamw":
            name = next(n for n, m in self.stack.methods.items() if m.plain)
            what = f"`{name}` needs the gradient to be the step, and `training.optimizer` is `adamw`"
            raise ConfigError(what, "say `sgd`, or leave it out")
        placed = {
            name for rule in spec.arms.rules(self.max_depth) for name in expand(rule, card, self.modules)
        }
        self.floor = min((m.layer for m in self.modules if m.name in placed), default=0)
        """The lowest layer that any arm adapts: what lies below never changes in this job."""

    def _check_arms(self) -> None:
        arms = self.spec.arms
        for rule in arms.placements:
            try:
                expand(rule, self.card, self.modules)
            except ValueError as error:
                raise ConfigError(f"arms.placements: {error}") from None
        if bad := [b for b in arms.precisions if b not in (32, 16, 8, 4)]:
            raise ConfigError(f"arms.bits: {bad[0]} is not one of 32, 16, 8, 4")
        if not arms.rules(self.max_depth):
            raise ConfigError(f"arms.depths {list(arms.depths)}: none is within max_depth {self.max_depth}")
        if task_kind(self.spec.task.kind).causal and not self.card.causal:
            raise ConfigError(
                f"task `{self.spec.task.kind}` needs a causal language model, `{self.card.name}` is a "
                f"{self.card.family} encoder"
            )
        if len(set(self.spec.task.labels)) != len(self.spec.task.labels):
            raise ConfigError("task.labels holds a label twice")
        if self.stack.space == "factors" and (max(arms.prune) > 0):
            raise ConfigError(
                "the stack needs factors that keep their coordinates, and `arms.prune` would cut them",
                "set `arms: {prune: [0]}` or use product space",
            )
        if max(arms.prune) > 0 and (
            users := [n for h in ("tensors", "express", "attach") for n, _ in self.stack.using(h)]
        ):
            raise ConfigError(
                f"`{users[0]}` works on whole maps, and `arms.prune` would cut them",
                "set `arms: {prune: [0]}`",
            )

    def task(self) -> Task:
        """What devices are told of the task."""
        t = self.spec.task
        return Task(t.dataset, t.kind, list(t.labels), t.max_length, t.template, t.tolerance, list(t.samples))


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _policy(spec: PolicySpec) -> Policy:
    if spec.name not in policies.modules():
        raise ConfigError(f"policy `{spec.name}` is not known", f"one of {', '.join(policies.modules())}")
    try:
        return msgspec.convert(spec.settings, policies.policy_class(spec.name))
    except msgspec.ValidationError as error:
        raise ConfigError(f"policy `{spec.name}`: {error}") from None
