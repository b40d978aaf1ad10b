"""`edge-agent infer`: the current model answers, on this device, without the service.

Three kinds of folder: an adapter over its base (what training leaves under `<state_dir>/adapter/current`),
a whole model (`coordinator export --format merged`), or an ONNX encoder (`--format onnx`), which needs
onnxruntime and tokenizers but no torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from rankfleet.federated.contract.tensors import Array
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.tasks import task_kind
from rankfleet.federated.wire.messages import Task

from .config import AgentConfig

"""What a row's input is called, where it is not `text`."""
BATCH, TOP = 16, 3
Rows = list[dict[str, Any]]


class Runtime(Protocol):
    """A loaded model."""

    task: Task

    def answers(self, rows: Rows) -> list[dict[str, Any]]:
        """One answer a row."""


def runtime(config: AgentConfig, folder: Path | None) -> Runtime:
    """The model in `folder`, or the current adapter. Raises ConfigError where there is none, or something
    is missing."""
    folder = folder or config.home / "adapter" / "current"
    if folder.is_file():
        folder = (
            folder.parent / folder.read_text(encoding="utf-8").strip()
        )  # where the system has no symbolic links for us
    try:
        told = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        task = msgspec.convert({"dataset": "", **told}, Task)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{folder} holds no tuned model: {error}", "take part in a job, or give the folder of an export"
        ) from None
    if (folder / "model.onnx").exists():
        return OnnxRuntime(folder, task)
    if (folder / "adapter_config.json").exists():
        return TorchRuntime(_base_of(config, folder, told), task, folder, int(told.get("bits", 32)), config)
    return TorchRuntime(folder, task, None, 32, config)


def _base_of(config: AgentConfig, folder: Path, told: dict[str, Any]) -> Path:
    """Where the base of an adapter lies on this device."""
    name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    where = config.models.get(name, "")
    if where.startswith("hub:"):
        from .exchange.base_models import from_hub

        return Path(from_hub(where[4:], name))
    found = config.home / "models" / str(told.get("base_digest")) if where == "coordinator" else Path(where)
    if not where or not found.exists():
        raise ConfigError(
            f"the adapter belongs to base model `{name}`, which is not on this device",
            f"`models: {{{name}: FOLDER}}`",
        )
    return found


class OnnxRuntime:
    """An encoder as ONNX."""

    def __init__(self, folder: Path, task: Task) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError(
                "an ONNX model needs the package onnxruntime", "pip install onnxruntime"
            ) from None
        from .tasks.tokens import Tokens

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.task, self.tokens = task, Tokens(folder)
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own classes differ between its versions
            raise ConfigError(
                f"{folder / 'model.onnx'} cannot be read: {str(error)[:200]}", "export it again"
            ) from None

    def scores(self, ids: Sequence[Sequence[int]]) -> Array:
        """Token ids → logits (rows, labels), or embeddings where the model has no head."""
        longest = max(len(i) for i in ids)
        given = np.zeros((2, len(ids), longest), np.int64)
        for row, i in enumerate(ids):
            given[0, row, : len(i)], given[1, row, : len(i)] = i, 1
        made: Array = self.session.run(None, {"input_ids": given[0], "attention_mask": given[1]})[-1]
        return made

    def answers(self, rows: Rows) -> list[dict[str, Any]]:
        """One answer a row."""
        template = self.task.template or "{text}"
        ids = self.tokens.ids(
            [template.replace("{text}", str(r["text"])) for r in rows], self.task.max_length
        )
        return [
            said(self.task, s) for at in range(0, len(ids), BATCH) for s in self.scores(ids[at : at + BATCH])
        ]


class TorchRuntime:
    """Any task on the engine that trains: a base, maybe an adapter in it, maybe a head."""

    def __init__(self, base: Path, task: Task, adapter: Path | None, bits: int, config: AgentConfig) -> None:
        import torch
        from safetensors.torch import load_file

        from .machine.accelerator import accelerator
        from .model import Base
        from .tasks import engine

        torch.set_num_threads(config.threads or torch.get_num_threads())
        self.task, self.torch, head = task, torch, (adapter or base / "head") / "head.safetensors"
        weights = load_file(adapter / "adapter_model.safetensors") if adapter else {}
        names = sorted({k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in weights})
        device = accelerator(config.worker.accelerator)
        self.base = Base(base, names, bits, {}, task_kind(task.kind).causal, device=device)
        if adapter:
            told = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            for name in names:
                a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                try:
                    self.base.sites[name].place(
                        a.to(device), b.to(device), float(told["lora_alpha"]) / float(told["r"]), False
                    )
                except ValueError as error:
                    raise ConfigError(
                        f"{adapter} belongs to another base model: {error}",
                        "correct `models` in the agent's YAML",
                    ) from None
        self.head = {k: t.to(device) for k, t in load_file(head).items()} if head.exists() else {}
        self._attach(adapter)
        self.engine: Any = engine(task, str(base))

    def _attach(self, adapter: Path | None) -> None:
        """Functions that methods put into the model, as `task.json` names them. Raises ConfigError where
        they cannot be there."""
        told = json.loads((adapter / "task.json").read_text(encoding="utf-8")) if adapter else {}
        if not told.get("attach"):
            return
        from rankfleet.federated.contract.catalogue import build_stack
        from rankfleet.federated.contract.spec import Spec

        from .model.places import Attached

        methods = build_stack(told["attach"])
        if self.base.core is None:
            raise ConfigError(
                f"`{next(iter(methods))}` needs an architecture that this engine runs itself",
                "use another base model",
            )
        self.base.core.places = places = Attached(self.base.sites)
        places.p = self.head
        for method in methods.values():
            method.attach(places, msgspec.convert(told["spec"], Spec), None)

    def answers(self, rows: Rows) -> list[dict[str, Any]]:
        """One answer a row."""
        if task_kind(self.task.kind).causal:
            return [
                {"answer": a} for a in self.engine.samples(self.base, [str(r["instruction"]) for r in rows])
            ]
        examples = self.engine.encode([{"label": 0, "value": 0.0, **r} for r in rows])
        found = []
        with self.torch.inference_mode():
            for at in range(0, len(examples), BATCH):
                scores = self.engine.forward(
                    self.base, self.head, self.engine.collate(examples[at : at + BATCH])
                )
                found += [said(self.task, s.cpu().numpy()) for s in scores]
        return found


def said(task: Task, scores: Array) -> dict[str, Any]:
    """What scores (labels,) mean: the likeliest labels with their shares, a number, or the embedding
    itself."""
    if not task_kind(task.kind).labelled:
        return {"value": float(scores[0])}
    if len(scores) != len(task.labels):
        return {"embedding": [float(s) for s in scores]}
    shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    best = np.argsort(-shares)[:TOP]
    return {
        "label": task.labels[best[0]],
        "shares": {task.labels[i]: round(float(shares[i]), 4) for i in best},
    }


def rows_of(task: Task, lines: Sequence[str]) -> Rows:
    """Lines as rows: JSON objects as they are, anything else as the task's input. Raises ConfigError for
    an object without it."""
    field, found = task_kind(task.kind).field, []
    for line in lines:
        try:
            row = json.loads(line) if line.lstrip().startswith("{") else {field: line}
        except ValueError:
            row = {field: line}
        if field not in row:
            raise ConfigError(
                f"a row has no `{field}`: {line[:80]}",
                f'one JSON object a line with the key "{field}", or plain text',
            )
        found.append(row)
    return found
