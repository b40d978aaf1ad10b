"""The base on the device: load safetensors, cut pruned channels, store in few bits, wrap what may be adapted."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from federated.errors import Refused
from federated.spec import Spec
from federated.tensors import Tensors
from federated.update import Masks

from .adapter import Adapted, as_tensor, frozen
from .quantise import HalfEmbedding, QuantLinear, use_bitsandbytes


class Base:
    """A prepared base model. `adapted` maps a checkpoint module name to its wrapper."""

    def __init__(self, folder: Path, names: list[str], bits: int, masks: Masks, causal: bool = False) -> None:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        if not list(folder.glob("*.safetensors")):
            raise Refused(f"{folder} holds no safetensors; pickled weights are never loaded")
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self.model: Any = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
        )
        frozen(self.model)
        _straight(self.model)
        self.bits = bits
        if bits == 4:
            use_bitsandbytes()
        self.adapted: dict[str, Adapted] = {}
        modules = dict(self.model.named_modules())
        for name in names:
            path = _resolve(name, modules) or _same_weight(folder, name, modules)
            linear = modules[path]
            if not isinstance(linear, nn.Linear):
                raise Refused(f"module `{name}` is a {type(linear).__name__}, only linear maps are adapted here")
            small = _cut(linear, masks.get(f"{name}.out"), masks.get(f"{name}.in"))
            wrapped = Adapted(QuantLinear(small, bits) if bits < 16 else small)
            _replace(self.model, path, wrapped)
            self.adapted[name] = wrapped
        if bits < 32:
            _shrink_rest(self.model, bits)
        frozen(self.model)

    def place(self, spec: Spec, tensors: Tensors) -> None:
        """Put an adapter in (compact arrays by `<module>.A/.B`); modules that it does not name run as they are."""
        for name, wrapper in self.adapted.items():
            if name in spec.pairs:
                pair = spec.pairs[name]
                wrapper.place(as_tensor(tensors[f"{name}.A"]), as_tensor(tensors[f"{name}.B"]), pair.scale, pair.trained)
            else:
                wrapper.clear()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable factors by `<module>.A/.B`."""
        found: dict[str, nn.Parameter] = {}
        for name, wrapper in sorted(self.adapted.items()):
            for side, p in (("A", wrapper.A), ("B", wrapper.B)):
                if p is not None and p.requires_grad:
                    found[f"{name}.{side}"] = p
        return found


def _straight(model: nn.Module) -> None:
    """GPT-2 keeps its linear maps transposed; from here on they are plain ones."""
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            linear = nn.Linear(weight.shape[0], weight.shape[1])
            linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
            _replace(model, path, linear)


def _resolve(name: str, modules: dict[str, nn.Module]) -> str:
    """The model's path for a checkpoint name; prefixes such as `bert.` or `model.` come and go. Empty where none fits."""
    if name in modules:
        return name
    found = [k for k in modules if k and (name.endswith("." + k) or k.endswith("." + name))]
    return max(found, key=len, default="")


def _same_weight(folder: Path, name: str, modules: dict[str, nn.Module]) -> str:
    """The path of the linear map that holds a checkpoint tensor: names change on loading in some architectures, weights do not."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if f"{name}.weight" not in tensors.keys():  # noqa: SIM118 - not a mapping
                continue
            weight = tensors.get_tensor(f"{name}.weight").float()
            if weight.dim() != 2:
                continue
            for path, module in modules.items():
                if isinstance(module, nn.Linear) and module.weight.shape == weight.shape and torch.equal(module.weight, weight):
                    return path
    raise Refused(f"the model has no module `{name}`", "job and device must hold the same base model")


def _cut(linear: nn.Linear, out: Any, in_: Any) -> nn.Linear:
    if out is None and in_ is None:
        return linear
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if out is not None:
        rows = torch.from_numpy(np.asarray(out, np.int64))
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if in_ is not None:
        weight = weight[:, torch.from_numpy(np.asarray(in_, np.int64))]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    small.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        small.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return small


def _shrink_rest(model: nn.Module, bits: int) -> None:
    """Embeddings in fp16 beside quantised layers; everything in bf16 at 16 bits."""
    if bits == 16:
        model.to(torch.bfloat16)
        return
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            _replace(model, path, HalfEmbedding(module))


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
