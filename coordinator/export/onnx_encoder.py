"""An encoder with its adapter and head as ONNX: the form in which pruned heads need no configuration, and
devices need no torch.

Inputs `input_ids` and `attention_mask`, int64 (batch, length), right-padded; outputs `embedding`, the mean
of the last hidden states over real tokens (batch, hidden), and `logits` (batch, labels) where the task has
a head. Standard operators of opset 20, fp32.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankfleet.federated.contract.tensors import Array, Tensors
from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import sync_folder, write_atomic
from rankfleet.profiles.architecture import Architecture, read_architecture

from .folder import copy_beside
from .weights import Weights

OPSET, IR = 20, 9
INSIDE = 1_500_000_000
"""Bytes up to which weights stay in the one file; a protobuf ends at 2 GB."""
GELU = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


def write_onnx(weights: Weights, to: Path, dense: Tensors, task: dict[str, Any]) -> Path:
    """Write `to/model.onnx`, the tokenizer and `task.json`; returns the model. Raises ConfigError."""
    try:
        import onnx
    except ImportError:
        raise ConfigError("exporting to ONNX needs the package onnx", "pip install onnx") from None
    kind = read_architecture(json.loads((weights.base / "config.json").read_text(encoding="utf-8")))
    if kind is None or kind.causal:
        raise ConfigError(
            f"a `{weights.card.family}` model is no encoder that we can write as ONNX",
            "--format merged or gguf-merged",
        )
    model = Graph(weights, kind).model(dense)
    to.mkdir(parents=True, exist_ok=True)
    copy_beside(weights.base, to)
    file = to / "model.onnx"
    outside = sum(t.ByteSize() for t in model.graph.initializer) > INSIDE
    onnx.save(
        model, str(file), save_as_external_data=outside, location="model.onnx.data" if outside else None
    )
    write_atomic(to / "task.json", json.dumps(task, indent=1).encode())
    sync_folder(to)
    return file


class Graph:
    """Nodes and weights, added one after the other; a method returns the name of its result."""

    def __init__(self, weights: Weights, kind: Architecture) -> None:
        self.weights, self.kind = weights, kind
        self.nodes: list[Any] = []
        self.kept: dict[str, Any] = {}
        word = f"{kind.names.word}.weight"
        found = [n for n in weights.places if n.endswith(word)]
        if not found:
            raise ConfigError(f"the checkpoint has no `{word}`", "copy the base model again")
        self.prefix = found[0][: -len(word)]

    def model(self, dense: Tensors) -> Any:
        """The whole model as an `onnx.ModelProto`, checked."""
        import onnx
        from onnx import TensorProto, helper

        size: Sequence[str] = ("batch", "length")
        given = [
            helper.make_tensor_value_info(n, TensorProto.INT64, size) for n in ("input_ids", "attention_mask")
        ]
        real = self.op("Cast", "attention_mask", to=TensorProto.FLOAT)
        hidden_from = self.op(
            "Unsqueeze",
            self.op("Mul", self.op("Sub", real, self.number(1.0)), self.number(1e9)),
            self.ints(1, 2),
        )
        x = self._embedded()
        for layer in range(self.kind.layers):
            x = self._layer(x, hidden_from, layer)
        share = self.op("Div", real, self.op("ReduceSum", real, self.ints(1), keepdims=1))
        mean = self.op(
            "Squeeze", self.op("MatMul", self.op("Unsqueeze", share, self.ints(1)), x), self.ints(1)
        )
        outputs = {self.op("Identity", mean, name="embedding"): self.kind.hidden}
        if "head.weight" in dense:
            head = self.map(mean, dense["head.weight"].T, dense["head.bias"])
            outputs[self.op("Identity", head, name="logits")] = len(dense["head.bias"])
        made = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ("batch", width))
            for n, width in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "encoder", given, made, list(self.kept.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="rankfleet"
        )
        if sum(t.ByteSize() for t in graph.initializer) < INSIDE:
            onnx.checker.check_model(model)
        return model

    def _embedded(self) -> str:
        names = self.kind.names
        x = self.op("Gather", self.keep(self._weight(names.word)), "input_ids")
        if names.position:
            table = self._weight(names.position)[self.kind.offset :]
            if names.kind:
                table = table + self._weight(names.kind)[0]
            length = self.op("Slice", self.op("Shape", "input_ids"), self.ints(1), self.ints(2))
            x = self.op("Add", x, self.op("Slice", self.keep(table), self.ints(0), length, self.ints(0)))
        return self._norm(x, names.norm0, 0)

    def _layer(self, x: str, hidden_from: str, layer: int) -> str:
        names, size = self.kind.names, self.kind.head_size
        parts = [self._both(n, layer) for n in (names.q, names.k, names.v)]
        heads = parts[0][0].shape[1] // size
        scale = np.float32(1 / math.sqrt(size))
        parts[0] = (parts[0][0] * scale, parts[0][1] * scale)  # instead of scaling every score
        joined = self.map(
            x, np.concatenate([w for w, _ in parts], axis=1), np.concatenate([b for _, b in parts])
        )
        split = self.op("Reshape", joined, self.ints(0, 0, 3, heads, size))
        q, k, v = (self.op("Gather", split, self.index(n), axis=2) for n in range(3))
        q, v = (self.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        scores = self.op("Add", self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1])), hidden_from)
        seen = self.op(
            "Transpose", self.op("MatMul", self.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3]
        )
        out = self.map(self.op("Reshape", seen, self.ints(0, 0, heads * size)), *self._both(names.o, layer))
        x = self._norm(self.op("Add", x, out), names.norm1, layer)
        inner = self.map(x, *self._both(names.up, layer))
        name = self.kind.activation
        inner = self.op("Relu", inner) if name == "relu" else self.op("Gelu", inner, approximate=GELU[name])
        return self._norm(
            self.op("Add", x, self.map(inner, *self._both(names.down, layer))), names.norm2, layer
        )

    def _norm(self, x: str, name: str, layer: int) -> str:
        stem = self.prefix + name.format(l=layer)
        weight, bias = (self.keep(self.weights.floats(f"{stem}.{part}")) for part in ("weight", "bias"))
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.kind.eps)

    def _weight(self, name: str) -> Array:
        return self.weights.floats(f"{self.prefix}{name}.weight")

    def _both(self, name: str, layer: int) -> tuple[Array, Array]:
        """A map's weight as (in, out) and its bias."""
        stem = self.prefix + name.format(l=layer)
        weight = self.weights.floats(f"{stem}.weight").T
        bias = f"{stem}.bias"
        return weight, self.weights.floats(bias) if bias in self.weights.places else np.zeros(
            weight.shape[1], np.float32
        )

    def map(self, x: str, weight: Array, bias: Array) -> str:
        """x·weight + bias, weight (in, out)."""
        return self.op("Add", self.op("MatMul", x, self.keep(weight)), self.keep(bias))

    def op(self, kind: str, *inputs: str, name: str = "", **options: Any) -> str:
        """One node."""
        from onnx import helper

        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{name}", **options))
        return name

    def keep(self, array: Array) -> str:
        """A weight."""
        from onnx import numpy_helper

        name = f"w{len(self.kept)}"
        kind = np.int64 if array.dtype.kind == "i" else np.float32
        self.kept[name] = numpy_helper.from_array(
            np.ascontiguousarray(array, kind).reshape(array.shape), name
        )
        return name

    def ints(self, *values: int) -> str:
        """A vector of whole numbers."""
        return self.keep(np.array(values, np.int64))

    def index(self, value: int) -> str:
        """A whole number."""
        return self.keep(np.array(value, np.int64))

    def number(self, value: float) -> str:
        """A number."""
        return self.keep(np.array(value, np.float32))
