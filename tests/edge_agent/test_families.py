"""Every family that the engine runs itself: equal to transformers, padded or not, forward and backward;
and in few bits from disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rankfleet.edge_agent.model import Base, transformer
from rankfleet.edge_agent.model.base import IGNORED
from rankfleet.edge_agent.model.stored.prepared import Shelf

from .families import ENCODERS, FAMILIES, make


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make(request.param, tmp_path_factory.mktemp("models") / request.param)


def batch(seed: int = 0) -> dict[str, Any]:
    """Three examples of 12, 7 and 9 tokens."""
    torch.manual_seed(seed)
    lengths = [12, 7, 9]
    ids, mask = torch.randint(4, 60, (3, 12)), torch.zeros(3, 12, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, n:], mask[row, :n] = 1, 1
    labels = torch.where((torch.arange(12) >= 5) & (mask > 0), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def theirs(folder: Path, causal: bool) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return (
        (AutoModelForCausalLM if causal else AutoModel)
        .from_pretrained(folder, attn_implementation="eager")
        .eval()
    )


def adapted(base: Base, rank: int = 2) -> None:
    """A random trained pair in every map."""
    torch.manual_seed(3)
    for site in base.sites.values():
        site.place(torch.randn(rank, site.base.in_) * 0.2, torch.randn(site.base.out, rank) * 0.2, 0.7, True)


@pytest.mark.parametrize("short", [64, 0])
def test_hidden_states_equal_those_of_transformers(
    model: tuple[str, Path], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By batched products, and by the fused kernel as for longer sequences."""
    monkeypatch.setattr(transformer, "SHORT", short)
    family, folder = model
    causal, given = family not in ENCODERS, batch()
    base, plain = Base(folder, [], 32, {}, causal), theirs(folder, causal)
    assert base.core is not None, f"{family} runs on transformers' modules"
    with torch.no_grad():
        ours, layout = base.hidden(given)
        ours = ours[: layout.real]
        trunk = plain.base_model if causal else plain
        expected = trunk(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"]
        ).last_hidden_state
    assert torch.allclose(ours, expected[given["attention_mask"].bool()], atol=1e-4), float(
        (ours - expected[given["attention_mask"].bool()]).abs().max()
    )


@pytest.mark.parametrize("short", [64, 0])
def test_losses_and_gradients_equal_those_of_transformers(
    model: tuple[str, Path], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged W + s·B·A in transformers' model; dL/dB and dL/dA follow from its dL/dW."""
    monkeypatch.setattr(transformer, "SHORT", short)
    family, folder = model
    causal, given = family not in ENCODERS, batch()
    base, plain = Base(folder, [], 32, {}, causal), theirs(folder, causal)
    adapted(base)
    weights = {}
    for name, p in plain.named_parameters():
        p.requires_grad_(False)
        stem = name.removesuffix(".weight")
        site = next(
            (
                s
                for k, s in base.sites.items()
                if stem == k or stem.endswith("." + k) or k.endswith("." + stem)
            ),
            None,
        )
        if site is not None and name.endswith(".weight"):
            change = 0.7 * site.B.detach() @ site.A.detach()
            p.add_(change.t() if family == "gpt2" else change)
            weights[site.name] = p.requires_grad_(True)
    assert len(weights) == len(base.sites)
    target = torch.randn(28, 32)
    if causal:
        losses, right, _ = base.answers(given)
        loss = losses.mean()
        shown = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        wanted = torch.nn.functional.cross_entropy(
            shown[:, :-1].reshape(-1, shown.shape[-1]), given["labels"][:, 1:].reshape(-1)
        )
        assert (shown[:, :-1].argmax(-1) == given["labels"][:, 1:])[
            given["labels"][:, 1:] != IGNORED
        ].sum() == right.sum()
    else:
        loss = (base.hidden(given)[0][:28] * target).sum()
        states = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
        wanted = (states[given["attention_mask"].bool()] * target).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    ours = dict(
        zip(base.parameters(), torch.autograd.grad(loss, list(base.parameters().values())), strict=True)
    )
    wanted.backward()
    for name, p in weights.items():
        gradient = (p.grad.t() if family == "gpt2" else p.grad).float()
        site = base.sites[name]
        for side, expected in (("A", 0.7 * site.B.t() @ gradient), ("B", 0.7 * gradient @ site.A.t())):
            assert torch.allclose(
                ours[f"{name}.{side}"], expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item()
            ), f"{name}.{side}"


def test_checkpointing_changes_no_gradient(model: tuple[str, Path]) -> None:
    family, folder = model
    base = Base(folder, [], 32, {}, family not in ENCODERS)
    adapted(base)
    found = []
    for base.core.checkpointing in (False, True):
        found.append(
            torch.autograd.grad(base.hidden(batch())[0][:28].square().sum(), list(base.parameters().values()))
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_from_disk_as_from_the_checkpoint(model: tuple[str, Path], tmp_path: Path, bits: int) -> None:
    family, folder = model
    causal, shelf = family not in ENCODERS, Shelf(tmp_path, 100)
    fresh = Base(folder, [], bits, {}, causal)
    for _ in range(2):
        kept = Base(folder, [], bits, {}, causal, shelf=shelf, digest="d")
        with torch.no_grad():
            assert torch.equal(fresh.hidden(batch())[0], kept.hidden(batch())[0])
    assert len(list(tmp_path.iterdir())) == (0 if bits == 32 and family != "gpt2" else 1)


def test_answers_of_generation_equal_those_of_transformers(model: tuple[str, Path]) -> None:
    family, folder = model
    if family in ENCODERS:
        pytest.skip("an encoder says nothing")
    base, plain, start = Base(folder, [], 32, {}, True), theirs(folder, True), [5, 9, 33, 12]
    made = plain.generate(
        torch.tensor([start]),
        attention_mask=torch.ones(1, 4),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    assert base.generate(start, 6, None) == made[0, 4:].tolist()
