"""Architectures that the engine has no description of run on transformers' own modules, with the same
adapted maps in them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfleet.federated.contract.update import Masks
from rankfleet.federated.errors import Refused

from .ops.adapted import Site, apply
from .ops.frozen import Frozen
from .ops.layout import Layout
from .stored.safetensors import cut


class Adapted(nn.Module):
    """A site as a module."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @property
    def weight(self) -> Tensor:
        """A stand-in; some models look at its dtype and device."""
        return next(iter(self.site.base.tensors.values()))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        return apply(x.reshape(-1, x.shape[-1]), [self.site])[0].view(*x.shape[:-1], self.site.base.out)


class HalfEmbedding(nn.Module):
    """A frozen embedding stored in fp16, looked up as fp32."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.register_buffer("weight", embedding.weight.detach().half())
        self.padding_idx = embedding.padding_idx

    weight: Tensor

    def forward(self, index: Tensor) -> Tensor:
        """Indices → fp32 rows."""
        return torch.nn.functional.embedding(index, self.weight).float()


def load(
    folder: Path, names: list[str], bits: int, masks: Masks, causal: bool, sites: dict[str, Site]
) -> Any:
    """The model with every named map replaced; `sites` gets them. Raises Refused."""
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        model: Any = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise Refused(f"transformers cannot load {folder}: {str(error).splitlines()[0][:200]}") from None
    model.eval().requires_grad_(False)
    _straight(model)
    modules = dict(model.named_modules())
    for name in names:
        path = _resolve(name, modules) or _same_weight(folder, name, modules)
        linear = modules[path]
        if not isinstance(linear, nn.Linear):
            raise Refused(f"module `{name}` is a {type(linear).__name__}, only linear maps are adapted here")
        weight, bias = cut(
            linear.weight.detach(),
            None if linear.bias is None else linear.bias.detach(),
            masks.get(f"{name}.out"),
            masks.get(f"{name}.in"),
        )
        base = Frozen(weight.shape[0], weight.shape[1], Frozen.pack(weight, bits), bias)
        sites[name] = Site(name, _layer_of(name), base)
        _replace(model, path, Adapted(sites[name]))
    if bits == 16:
        model.to(torch.bfloat16)
    elif bits < 16:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Embedding):
                _replace(model, path, HalfEmbedding(module))
    model.requires_grad_(False)
    return model


def hidden(model: Any, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Layout]:
    """Last hidden states, rows of real tokens (n, h) fp32."""
    known = {k: batch[k].to(device) for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
    states = model(**known).last_hidden_state.float()
    layout = Layout(
        batch["attention_mask"]
        if "attention_mask" in batch
        else torch.ones(states.shape[:2], dtype=torch.long),
        device,
    )
    return layout.rows_of(states), layout


def _layer_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


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
    """The model's path for a checkpoint name; prefixes such as `bert.` or `model.` come and go. Empty
    where none fits."""
    if name in modules:
        return name
    found = [k for k in modules if k and (name.endswith("." + k) or k.endswith("." + name))]
    return max(found, key=len, default="")


def _same_weight(folder: Path, name: str, modules: dict[str, nn.Module]) -> str:
    """The path of the linear map that holds a checkpoint tensor: names change on loading in some
    architectures, weights do not."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if f"{name}.weight" not in tensors.keys():  # noqa: SIM118 - not a mapping
                continue
            weight = tensors.get_tensor(f"{name}.weight").float()
            if weight.dim() != 2:
                continue
            for path, module in modules.items():
                if (
                    isinstance(module, nn.Linear)
                    and module.weight.shape == weight.shape
                    and torch.equal(module.weight, weight)
                ):
                    return path
    raise Refused(f"the model has no module `{name}`", "job and device must hold the same base model")


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
