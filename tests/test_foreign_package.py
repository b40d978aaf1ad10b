"""A method in a package of somebody else's, found by its entry point: a real job, without an edit here."""

from pathlib import Path

import pytest

from rankfleet.coordinator.export import write
from rankfleet.coordinator.store import tables
from rankfleet.federated.contract import catalogue

from .world import World, job

METHOD = '''"""Gained: one number a map scales its pair, trained at twice the gradient."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rankfleet import Method, ServerContext, Spec, StepContext, Tensor, Torch


class Gained(Method, frozen=True):
    """`tensors`, `express` and `gradient`."""

    def tensors(self, spec: Spec, ctx: ServerContext) -> dict[str, Tensor]:
        """1, for every map."""
        return {f"{name}.gain": Tensor(np.ones(1, np.float32)) for name in spec.pairs}

    def express(self, params: Mapping[str, Any], spec: Spec, xp: Any) -> dict[str, Any]:
        """gain times B."""
        names = [m for m in spec.pairs if f"{m}.gain" in params and f"{m}.B" in params]
        return {f"{m}.B": params[f"{m}.B"] * params[f"{m}.gain"] for m in names}

    def gradient(
        self, params: Mapping[str, Torch], batch: dict[str, Torch], ctx: StepContext
    ) -> tuple[float, dict[str, Torch]]:
        """Twice that of the batch."""
        value, grads = ctx.gradient(params, batch)
        return value, {name: 2 * grad for name, grad in grads.items()}
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as pip leaves it: a module, and what it says of itself."""
    site = tmp_path / "site"
    (site / "theirs-1.0.dist-info").mkdir(parents=True)
    (site / "their_gained.py").write_text(METHOD)
    about = site / "theirs-1.0.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rankfleet.methods]\ngained = their_gained\n")
    monkeypatch.syspath_prepend(site)
    for cached in (catalogue.modules, catalogue.method_class):
        cached.cache_clear()
        monkeypatch.setattr(catalogue, cached.__name__, cached)


@pytest.fixture(autouse=True)
def forgotten() -> object:
    """The catalogue knows nothing of it before and afterwards."""
    yield
    catalogue.modules.cache_clear()
    catalogue.method_class.cache_clear()


async def test_a_foreign_method_runs_survives_and_is_exported(
    tmp_path: Path, tiny: Path, installed: None
) -> None:
    entry = next(e for e in catalogue.entries() if e.name == "gained")
    assert set(entry.hooks) == {"tensors", "express", "gradient"}
    text = job(stack=["gained"], rounds=3, arms={"ranks": [2], "bits": [32], "steps": [2], "batch": 4})
    async with World(tmp_path / "quiet", tiny, devices=2) as world:
        quiet = await world.run(text)
        digest = world.digest(quiet)
        versions = {r["digest"] for r in world.coordinator.ledger.rows(tables.versions, job=quiet)}
        assert len(versions) == 4
    async with World(tmp_path / "killed", tiny, devices=2) as world:
        name = world.coordinator.jobs.submit(text)
        rows = world.coordinator.ledger.rows
        await world.until(lambda: any(r["state"] == "counted" for r in rows(tables.assignments, job=name)))
        for device in world.names:
            await world.kill_agent(device)
        await world.kill_coordinator()
        await world.start_coordinator()
        for device in world.names:
            await world.start_agent(device)
        await world.until(lambda: world.job_state(name) == "finished")
        assert world.digest(name) == digest
        write(world.coordinator.config, name, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
