"""An encoder as ONNX computes what the engine computes, whole and cut, and onnxruntime alone runs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rankfleet.coordinator.export.onnx_encoder import write_onnx
from rankfleet.coordinator.export.weights import Weights
from rankfleet.coordinator.planning import importance as channels
from rankfleet.coordinator.store.versions import Version
from rankfleet.edge_agent.config import AgentConfig
from rankfleet.edge_agent.infer import OnnxRuntime, runtime
from rankfleet.edge_agent.model import Base
from rankfleet.federated.contract.update import LowRank
from rankfleet.federated.errors import ConfigError
from rankfleet.profiles.card import read_card

from .edge_agent.families import ENCODERS, make

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
TASK = {
    "dataset": "d",
    "kind": "text_classification",
    "labels": ["a", "b", "c"],
    "max_length": 9,
    "version": 3,
}


def version(folder: Path) -> Version:
    card, rng = read_card(folder), np.random.default_rng(0)
    pairs = {
        m.name: LowRank(rng.standard_normal((m.out, 2)) * 0.2, rng.standard_normal((2, m.in_)) * 0.2)
        for m in card.modules
    }
    dense = {
        "head.weight": rng.standard_normal((3, card.hidden)).astype(np.float32),
        "head.bias": np.float32([0.1, -0.2, 0.3]),
    }
    return Version(3, pairs, dense, {}, {})


def ours(folder: Path, made: Version, ratio: float, ids: list[list[int]]) -> torch.Tensor:
    """Logits by the engine: the base cut by masks, the adapter beside it."""
    card = read_card(folder)
    masks = channels.masks(card, channels.importance(folder, card), ratio)
    base = Base(folder, [], 32, masks)
    for name, site in base.sites.items():
        out, in_ = masks.get(f"{name}.out", slice(None)), masks.get(f"{name}.in", slice(None))
        pair = made.pairs[name]
        site.place(
            torch.from_numpy(pair.A[:, in_]).float(), torch.from_numpy(pair.B[out]).float(), 0.7, False
        )
    length = max(map(len, ids))
    padded = torch.tensor([i + [1] * (length - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in ids])
    with torch.no_grad():
        rows, layout = base.hidden({"input_ids": padded, "attention_mask": mask})
        return layout.means(rows) @ torch.from_numpy(made.dense["head.weight"]).t() + torch.from_numpy(
            made.dense["head.bias"]
        )


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("family", ENCODERS)
def test_it_computes_what_the_engine_computes(tmp_path: Path, family: str, ratio: float) -> None:
    import onnxruntime

    folder = make(family, tmp_path / "base")
    made, ids = version(folder), [[5, 9, 11, 3, 22, 60, 7], [8, 2], [40, 41, 42, 43]]
    file = write_onnx(Weights(made, folder, ratio, 0.7), tmp_path / "out", made.dense, TASK)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = np.ones((2, 3, 7), np.int64)
    given[1] = 0
    for row, i in enumerate(ids):
        given[0, row, : len(i)], given[1, row, : len(i)] = i, 1
    embedding, logits = session.run(None, {"input_ids": given[0], "attention_mask": given[1]})
    expected = ours(folder, made, ratio, ids).numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert embedding.shape == (3, 32)
    if ratio:
        assert (
            file.stat().st_size
            < 0.75
            * write_onnx(Weights(made, folder, 0.0, 0.7), tmp_path / "w", made.dense, TASK).stat().st_size
        )


def test_a_decoder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "base")
    with pytest.raises(ConfigError, match="no encoder") as told:
        write_onnx(Weights(Version(0, {}, {}, {}, {}), folder, 0.0, 1.0), tmp_path / "out", {}, TASK)
    assert "gguf-merged" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_onnx_runs_without_torch(tmp_path: Path, tiny: Path) -> None:
    made = version(tiny)
    write_onnx(Weights(made, tiny, 0.5, 0.7), tmp_path / "out", made.dense, TASK)
    program = (
        "import sys; from pathlib import Path; from rankfleet.edge_agent.cli import main; "
        f"code = main(['infer', 'red cat', 'sun', '--json', '--model', {str(tmp_path / 'out')!r}]); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("[]")
    assert done.stdout.count('"label"') == 2
    found = runtime(AgentConfig(), tmp_path / "out")
    assert isinstance(found, OnnxRuntime)
    words = ["red cat", "sun"]
    expected = ours(tiny, made, 0.5, found.tokens.ids(words, 9)).softmax(-1)
    for answer, shares in zip(found.answers([{"text": w} for w in words]), expected, strict=True):
        assert answer["label"] == TASK["labels"][int(shares.argmax())]
        assert answer["shares"][answer["label"]] == pytest.approx(float(shares.max()), abs=1e-3)
