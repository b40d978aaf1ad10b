"""A folder of safetensors, read tensor by tensor. Tensors are views of the mapped file: what is not
touched takes no memory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankfleet.federated.errors import Refused


class Checkpoint:
    """Every tensor of a model folder by name. Raises Refused where the folder or a part of it is missing
    or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise Refused(f"{folder} holds no safetensors; pickled weights are never loaded")
        self._missing(files)
        self.config: dict[str, Any] = self._config()
        self._files: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise Refused(f"{file} cannot be read: {error}", "copy the model again") from None
            names: list[str] = opened.keys()  # type: ignore[no-untyped-call]
            self._files |= dict.fromkeys(names, (file, opened))

    def _missing(self, files: list[Path]) -> None:
        """A checkpoint in shards has all that its index names."""
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            if gone := sorted(named - {f.name for f in files}):
                raise Refused(
                    f"{self.folder} lacks {len(gone)} of {len(named)} shards: {', '.join(gone[:3])}",
                    "copy the model again",
                )

    def _config(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Refused(f"{self.folder}/config.json cannot be read: {error}") from None
        return found

    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, apart: bool = False) -> Tensor:
        """One tensor as the file has it, mapped; `apart`: by a map of its own, which ends with it. Raises
        Refused."""
        if name not in self._files:
            raise Refused(
                f"the checkpoint in {self.folder} has no tensor `{name}`",
                "job and device must hold the same base model",
            )
        path, opened = self._files[name]
        tensor: Tensor = (safe_open(path, framework="pt") if apart else opened).get_tensor(name)
        return tensor

    def norm(self, name: str, plus: float = 0.0) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a norm, fp32; `gamma` and `beta` in old files. None where there is none."""
        if not name:
            return None
        weight = self._first(f"{name}.weight", f"{name}.gamma")
        if weight is None:
            raise Refused(f"the checkpoint in {self.folder} has no tensor `{name}.weight`")
        bias = self._first(f"{name}.bias", f"{name}.beta")
        return weight.float() + plus, None if bias is None else bias.float().clone()

    def _first(self, *names: str) -> Tensor | None:
        return next((self.get(n) for n in names if n in self), None)

    def prefix(self, known: str) -> str:
        """What stands before a known name here, such as `bert.` or `model.`. Raises Refused."""
        found = [k for k in self._files if k == known or k.endswith("." + known)]
        if not found:
            raise Refused(f"the checkpoint in {self.folder} has no tensor `{known}`")
        return min(found, key=len).removesuffix(known)


def cut(weight: Tensor, bias: Tensor | None, out: Any, in_: Any) -> tuple[Tensor, Tensor | None]:
    """Kept rows and columns of a map (out, in)."""
    if out is not None:
        rows = torch.as_tensor(out, dtype=torch.long)
        weight, bias = weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
    if in_ is not None:
        weight = weight.index_select(1, torch.as_tensor(in_, dtype=torch.long))
    return weight, bias
