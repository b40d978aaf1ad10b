"""The optimiser: equal to torch's, and a training step that imports no compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankfleet.edge_agent.worker.optimizer import AdamW, Flat, optimizer

from .families import make

STEP = """
import sys
from pathlib import Path
import torch
from rankfleet.edge_agent.worker import trainer, worker
from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.worker.optimizer import AdamW, Flat
base = Base(Path(sys.argv[1]), [], 32, {})
for site in base.sites.values():
    site.place(torch.randn(2, site.base.in_), torch.zeros(site.base.out, 2), 1.0, True)
params = base.parameters()
flat = Flat(params, params)
optimiser = AdamW(flat.values)
for base.core.checkpointing in (False, True):
    ids = torch.randint(0, 61, (2, 9))
    loss = base.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].square().mean()
    flat.take(dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)))
    optimiser.step(flat.values, flat.gradient, 1e-3)
assert all(torch.isfinite(p).all() for p in params.values())
print([m for m in ("torch._dynamo", "sympy", "transformers") if m in sys.modules])
"""


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_as_torch_does(name: str) -> None:
    torch.manual_seed(1)
    start = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    params = {k: t.clone() for k, t in start.items()}
    theirs = torch.nn.Parameter(torch.cat([t.reshape(-1) for t in start.values()]))
    peer = (
        torch.optim.SGD([theirs], lr=0.1)
        if name == "sgd"
        else torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    )
    flat = Flat(params, start)
    ours = optimizer(name, flat.values)
    for step in range(20):
        grads = {k: torch.randn_like(t) * (10.0 if step % 3 else 0.01) for k, t in start.items()}
        theirs.grad = torch.cat([g.reshape(-1) for g in grads.values()])
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        for group in peer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        peer.step()
        flat.take(grads)
        ours.step(flat.values, flat.gradient, 0.1 / (step + 1))
    assert torch.allclose(flat.values, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(params["a"], flat.values[:12].view(3, 4))


def test_moments_are_what_a_checkpoint_needs() -> None:
    torch.manual_seed(2)
    grads = [torch.randn(7) for _ in range(6)]
    whole, values = AdamW(torch.ones(7)), torch.ones(7)
    for g in grads:
        whole.step(values, g, 0.1)
    first, cut = AdamW(torch.ones(7)), torch.ones(7)
    for g in grads[:3]:
        first.step(cut, g, 0.1)
    second = AdamW(cut)
    for name, moment in second.state.items():
        moment.copy_(first.state[name])
    for g in grads[3:]:
        second.step(cut, g, 0.1)
    assert torch.equal(values, cut)


def test_a_training_step_imports_no_compiler(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-c", STEP, str(make("bert", tmp_path))], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "[]"
