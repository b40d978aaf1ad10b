"""Pages: lines that fit, links that lead somewhere, figures that have a source, snippets that run, nothing
out of date."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from demo import terminal
from rankfleet import bandit
from rankfleet.federated.contract import pages
from rankfleet.federated.contract.contexts import ClientContext, ServerContext, StepContext
from rankfleet.federated.contract.method import HOOKS, Method
from rankfleet.federated.contract.spec import Dense, Pair, Spec
from rankfleet.federated.contract.update import LowRank, Update

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]
GUIDE = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def outside_of_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_fit_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 110]
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", outside_of_code(text)):
        assert "://" in target or (page.parent / target).exists(), (
            f"{name(page)} leads to {target}, which does not exist"
        )


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md", "docs/words.md", "docs/add_a_method.md"])
def test_files_and_folders_that_are_named_exist(page: str) -> None:
    named = re.findall(
        r"`((?:bandit|coordinator|edge_agent|federated|profiles|simulator)/[\w/.]*)`",
        (ROOT / page).read_text(),
    )
    assert not [path for path in named if not (ROOT / path).exists()]


def test_figures_of_the_readme_have_a_source() -> None:
    readme, source = ((ROOT / n).read_text(encoding="utf-8") for n in ("README.md", "docs/benchmarks.md"))
    table = readme.partition("## In figures")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    figures = re.findall(
        r"\d+(?:\.\d+)?(?:%| kB| MB| s\b| times)?", " ".join(re.sub(r"flwr [\d.]+", "", row) for row in rows)
    )
    assert len(figures) > 8
    assert not [f for f in figures if not re.search(rf"(?<![\d.]){re.escape(f)}(?![\d.]*\d)", source)]


def test_every_figure_says_its_command_and_day() -> None:
    sections = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").split("\n## ")[1:]
    for section in sections:
        assert re.search(r"`make [a-z-]+`", section), section.partition("\n")[0]
    dated = [s for s in sections if not s.startswith("Small ones")]
    assert all(re.search(r"\d{4}-\d\d-\d\d", s) for s in dated)


def test_pictures_show_the_run_that_the_readme_quotes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reached = re.search(r"no device has seen \| ([\d.]+%)", readme)
    assert reached
    assert f">{reached[1]}<" in (ROOT / "docs/pictures/demo.svg").read_text(encoding="utf-8")
    recording = terminal.read(ROOT / "docs/pictures/session.jsonl")
    assert any(re.search(rf"federated, after +{re.escape(reached[1])}$", text) for _, text in recording)
    assert terminal.draw(recording) == (ROOT / "docs/pictures/session.svg").read_text(encoding="utf-8")


def test_pages_of_methods_and_policies_are_up_to_date() -> None:
    with pytest.raises(SystemExit) as end:
        pages.main([str(ROOT / "docs"), bandit.__name__, "--check"])
    assert end.value.code is None, end.value.code


def test_every_hook_has_a_heading() -> None:
    headings = re.findall(r"^### `(\w+)`$", GUIDE, flags=re.MULTILINE)
    assert not set(HOOKS) ^ set(headings)
    assert len(headings) == len(set(headings))


def snippets() -> dict[str, type[Method]]:
    """Every class that the guide defines, from its code as printed, one block after the other."""
    space: dict[str, Any] = {"__name__": "docs.add_a_method"}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(compile(block, "docs/add_a_method.md", "exec"), space)
    return {
        n: k for n, k in space.items() if isinstance(k, type) and issubclass(k, Method) and k is not Method
    }


def context(kind: type) -> Any:
    """A stand-in that has what the real context declares and nothing else."""

    def fit(start: Any, **options: Any) -> Any:
        return start

    def batches() -> Iterator[Any]:
        yield batch

    batch = {"labels": torch.zeros(4), "ids": torch.zeros(4, 3)}
    tensors = {"m.A": np.ones((2, 3), np.float32), "m.B": np.ones((4, 2), np.float32)}
    values: dict[str, Any] = {
        "round": SimpleNamespace(number=1, total=4, leg="count"),
        "device": "d0",
        "state": {},
        "rng": np.random.default_rng(0),
        "down": {},
        "up": {},
        "steps": 4,
        "lr": 0.1,
        "maps": {"m": SimpleNamespace(layer=0, out=4), "n": SimpleNamespace(layer=1, out=4)},
        "mean": lambda updates: {"m": LowRank(tensors["m.B"], tensors["m.A"])},
        "fit": fit,
        "batches": batches,
        "losses": lambda params, batch: torch.arange(4.0),
        "task_loss": lambda params, batch: torch.tensor(1.0),
        "gradient": lambda params, batch: (1.0, {k: torch.ones_like(p) for k, p in params.items()}),
        "examples": [{"ids": [1]}] * 4,
        "held": [{"ids": [1]}],
        "collate": lambda examples: batch,
    }
    kept = {"received", "start"}
    as_torch = {k: torch.from_numpy(t) for k, t in tensors.items()}
    values |= dict.fromkeys(kept, as_torch if kind is StepContext else tensors)
    return SimpleNamespace(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})


def arguments(hook: str) -> dict[str, Any]:
    """A value for each parameter that the contract gives this hook."""
    parameters = inspect.signature(getattr(Method, hook)).parameters
    spec = Spec({"m": Pair(0, 4, 3, 2, 1.0, 4, 3, "v")}, {"head": Dense((2,))})
    tensors = {
        "m.A": np.ones((2, 3), np.float32),
        "m.B": np.ones((4, 2), np.float32),
        "m.gain": np.ones(1, np.float32),
    }
    on_device = "StepContext" in str(parameters["ctx"].annotation) if "ctx" in parameters else False
    point = {k: torch.from_numpy(t) for k, t in tensors.items() if k != "m.gain"} if on_device else tensors
    update = Update("d0", 1.0, {k: tensors[k] for k in ("m.A", "m.B")}, spec, tensors)
    values: dict[str, Any] = dict.fromkeys(("adapter", "delta", "params", "start", "grad"), point)
    values |= {
        "spec": spec,
        "xp": np,
        "devices": ["a", "b", "c"],
        "ask": {"placement": {"m": 2, "n": 2}, "rank": 2, "steps": 4, "lr": 0.1},
        "device": "d0",
        "name": "m",
        "model": SimpleNamespace(
            **dict.fromkeys(("before", "after", "enter", "front", "pooled"), lambda *a: None)
        ),
        "examples": [{"ids": [1]}] * 4,
        "batch": {"labels": torch.zeros(4)},
        "loss": torch.tensor(1.0),
        "update": update,
        "updates": [update] * 3,
        "arrived": [],
        "out": ["d1"],
        "elapsed": 1.0,
        "change": {"m": LowRank(tensors["m.B"], tensors["m.A"]), "head": np.ones(2)},
        "question": {},
        "answers": {"d0": {"examples": np.array([3])}},
        "numbers": 100,
        "bits": 3200.0,
        "weight": np.ones((4, 3)),
        "bias": None,
        "tensors": {"m.shift": np.ones(4)},
    }
    for kind in (ServerContext, ClientContext, StepContext):
        if "ctx" in parameters and kind.__name__ in str(parameters["ctx"].annotation):
            values["ctx"] = context(kind)
    return {p: values[p] for p in parameters if p != "self"}


def test_snippets_run() -> None:
    kinds = snippets()
    assert len(kinds) > 20
    for title, kind in kinds.items():
        unknown = [
            n
            for n, v in vars(kind).items()
            if inspect.isfunction(v) and not n.startswith("_") and n not in HOOKS
        ]
        assert not unknown, f"{title} defines {unknown}, which the contract does not have"
        for hook in HOOKS:
            if hook in vars(kind):
                getattr(kind(), hook)(*arguments(hook).values())
