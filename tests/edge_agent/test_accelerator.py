"""The engine on another device than the CPU, without one: torch's `meta` device holds no numbers but knows
where everything lies."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankfleet.edge_agent.machine import accelerator
from rankfleet.edge_agent.model import Base
from rankfleet.edge_agent.tasks.causal_lm import _means
from rankfleet.edge_agent.worker.optimizer import AdamW, Flat
from rankfleet.federated.errors import Refused

from .families import ENCODERS, FAMILIES, make

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])


class OnePlace(TorchDispatchMode):
    """Objects to an operation on tensors of two places, copies apart; a number on the CPU is no place."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = {t.device.type for t in tensors if t.dim()}
        if len(places) > 1 and "copy" not in op.name():
            raise RuntimeError(f"{op.name()} on {sorted(places)}")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bits", "checkpointing"), [(32, True), (16, False), (8, False), (4, False)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_training_step_stays_on_its_device(
    tmp_path: Path, family: str, bits: int, checkpointing: bool
) -> None:
    causal = family not in ENCODERS
    base = Base(make(family, tmp_path), [], bits, {}, causal, device="meta", half=bits < 16)
    core = base.core
    assert core is not None
    core.checkpointing = checkpointing
    for site in base.sites.values():
        a, b = torch.randn(2, site.base.in_, device="meta"), torch.zeros(site.base.out, 2, device="meta")
        site.place(a, b, 0.5, site.layer > 0)
    params = base.parameters()
    flat = Flat(params, params)
    optimiser = AdamW(flat.values)
    long = torch.randint(3, 60, (2, 80))
    with OnePlace():
        for ids, mask in [(IDS, MASK)] + (
            [(long, torch.ones_like(long))] if family not in ("roberta", "gpt2") else []
        ):
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
            x, layout = base.hidden(batch)
            loss = layout.means(x).square().mean()
            if causal:
                losses, right, owners = base.answers(batch)
                assert (losses.device.type, right.device.type, owners.device.type) == ("meta", "meta", "cpu")
                loss = loss + _means(losses, owners, len(ids)).mean()
            grads = torch.autograd.grad(loss, list(params.values()))
            assert {g.device.type for g in grads} == {"meta"}
            flat.take(dict(zip(params, grads, strict=True)))
            optimiser.step(flat.values, flat.gradient, 1e-3)


def test_the_guard_objects_to_two_places() -> None:
    with OnePlace(), pytest.raises(RuntimeError, match="add"):
        torch.zeros(2, device="meta") + torch.zeros(2)


def test_without_a_gpu_the_cpu_is_taken_and_cuda_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert accelerator.accelerator("auto").type == "cpu"
    assert accelerator.accelerator("cpu").type == "cpu"
    with pytest.raises(Refused, match="no CUDA kernel runs here"):
        accelerator.accelerator("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_on_a_gpu_as_on_the_cpu(tmp_path: Path, family: str, bits: int) -> None:
    folder, found = make(family, tmp_path), []
    for device in ("cpu", "cuda"):
        base = Base(folder, [], bits, {}, family not in ENCODERS, device=device)
        rng = np.random.default_rng(0)
        for site in base.sites.values():
            a, b = (
                torch.from_numpy(rng.standard_normal(s)).float()
                for s in ((2, site.base.in_), (site.base.out, 2))
            )
            site.place(a.to(device) * 0.1, b.to(device) * 0.1, 0.5, True)
        rows, _ = base.hidden({"input_ids": IDS, "attention_mask": MASK})
        grads = torch.autograd.grad(rows[:20].square().mean(), list(base.parameters().values()))
        found.append((rows[:20].detach().cpu(), [g.cpu() for g in grads]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    assert all(
        torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(found[0][1], found[1][1], strict=True)
    )
