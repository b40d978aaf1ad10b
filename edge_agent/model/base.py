"""The base model of a job on this device, with adapters in it: what a training step sees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfleet.federated.contract.spec import Spec
from rankfleet.federated.contract.tensors import Tensors
from rankfleet.federated.contract.update import LowRank, Masks
from rankfleet.federated.errors import Refused
from rankfleet.profiles.architecture import read_architecture

from . import foreign
from .cache.activations import Activations
from .cache.prefix import Prefix, prefix_id
from .ops import vocabulary
from .ops.adapted import Site
from .ops.layout import Layout
from .ops.quantise import use_bitsandbytes
from .stored.load import Recipe, assemble
from .stored.prepared import Shelf, needed
from .stored.safetensors import Checkpoint
from .transformer import Transformer

IGNORED = -100


class Base:
    """A prepared model. `sites` maps a checkpoint's name of a map to what runs in its place.

    `names` are the maps that may be adapted or cut (in a known architecture all are); `half`: maps of 8
    and 4 bits are computed with in bf16; `device`: where it computes, batches come on the CPU. Raises
    Refused for what cannot be loaded.
    """

    def __init__(
        self, folder: Path, names: list[str], bits: int, masks: Masks, causal: bool = False, *,
        half: bool = False,
        shelf: Shelf | None = None, digest: str = "", device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.bits, self.causal, self.transposed, self.digest, self.masks = bits, causal, False, digest, masks
        self.sites: dict[str, Site] = {}
        self._scales: dict[str, float] = {}
        """Of the maps that the adapter names."""
        self.device = torch.device(device)
        self.core: Transformer | None = None
        self.prefix: Prefix | None = None
        self.model: Any = None
        if bits == 4:
            use_bitsandbytes(self.device)
        source = Checkpoint(folder)
        kind = read_architecture(source.config)
        if kind is None:
            self.model = foreign.load(folder, names, bits, masks, causal, self.sites).to(self.device)
            for site in self.sites.values():
                site.base.to(self.device)
            return
        self.transposed = kind.transposed
        recipe = Recipe(source, kind, bits, masks, causal)
        if shelf is not None and needed(recipe):
            layers, rest = shelf.open(recipe, digest)
        else:
            layers, rest = [lambda n=n: recipe.layer(n) for n in range(kind.layers)], recipe.rest  # type: ignore[misc]
        self.core = assemble(recipe, layers, rest, self.sites, self.device)
        self.core.dtype = torch.bfloat16 if bits == 16 or (half and bits < 16) else torch.float32
        if missing := [n for n in names if n not in self.sites]:
            raise Refused(
                f"the model has no module `{missing[0]}`", "job and device must hold the same base model"
            )

    def place(self, spec: Spec, tensors: Tensors, carry: Mapping[str, LowRank] | None = None) -> None:
        """Put an adapter in (compact arrays by `<module>.A/.B`); maps that it does not name run as they
        are. `carry`: applied frozen."""
        self.clear()
        self._scales = {n: p.scale for n, p in spec.pairs.items()}
        for name, pair in spec.pairs.items():
            a, b = (as_tensor(tensors[f"{name}.{side}"], self.device) for side in "AB")
            if pair.rank:
                self.sites[name].place(a, b, pair.scale, pair.trained)
        for name, pair_of in (carry or {}).items():
            if name in self.sites:
                self.sites[name].carry = as_tensor(pair_of.B, self.device), as_tensor(pair_of.A, self.device)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute with these tensors as they are, leaves or results of others: factors in the adapter's
        maps, all in attached functions."""
        for name, scale in self._scales.items():
            a, b, site = tensors[f"{name}.A"], tensors[f"{name}.B"], self.sites[name]
            site.A, site.B, site.scale = (a, b, scale) if a.shape[0] else (None, None, scale)
        if self.core is not None and self.core.places is not None:
            self.core.places.p = tensors

    def clear(self) -> None:
        """The base alone: no pairs, no carry, no functions. What one job put in, the next must not find."""
        self._scales = {}
        for site in self.sites.values():
            site.clear()
        if self.core is not None:
            self.core.places = None

    def parameters(self) -> dict[str, Tensor]:
        """Trainable factors by `<module>.A/.B`."""
        found: dict[str, Tensor] = {}
        for name, site in sorted(self.sites.items()):
            for side, p in (("A", site.A), ("B", site.B)):
                if p is not None and p.requires_grad:
                    found[f"{name}.{side}"] = p
        return found

    def hidden(self, batch: dict[str, Any], layer: int | None = None) -> tuple[Tensor, Layout]:
        """Last hidden states of a batch: rows of tokens (layout.size, hidden), fp32, and where they belong.

        `layer`: what enters that layer instead. Raises Refused for a layer that there is not, or where the
        engine does not run the model itself.
        """
        if self.core is None:
            if layer is not None:
                raise Refused(
                    "this architecture runs on transformers' modules: the engine sees its last layer alone"
                )
            return foreign.hidden(self.model, batch, self.device)
        if layer is not None and not 0 <= layer <= self.core.kind.layers:
            raise Refused(f"the model has {self.core.kind.layers} layers, none is number {layer}")
        x, layout, first = self._entering(batch, layer)
        if self.core.places is None:
            x = self.core.run(x, layout, first, layer)
        else:
            x, longer = self.core.places.fronted(x, layout)
            x = self.core.places.without(self.core.run(x, longer, first, layer), longer, layout)
        return (self.core.finish(x) if layer is None else x), layout

    def _entering(self, batch: dict[str, Any], layer: int | None) -> tuple[Tensor, Layout, int]:
        """The rows that the first layer reads, or those of a higher one that are kept, where they belong,
        and that layer's number."""
        assert self.core is not None
        if "pixel_values" in batch:
            x = self.core.embed_images(batch["pixel_values"].to(self.device))
            return (
                x,
                Layout(
                    torch.ones(len(batch["pixel_values"]), len(x) // len(batch["pixel_values"])), self.device
                ),
                0,
            )
        layout = Layout(batch["attention_mask"], self.device)
        if self.prefix is not None and "key" in batch and (layer is None or layer >= self.prefix.at):
            return self.prefix.states(batch, layout), layout, self.prefix.at
        return self.core.embed(batch["input_ids"], layout), layout, 0

    def headed(self, features: Tensor) -> Tensor:
        """What a task's head reads: features (batch, hidden) after the functions that methods put there."""
        return (
            features if self.core is None or self.core.places is None else self.core.places.headed(features)
        )

    def read_words(self, examples: Sequence[Sequence[int]]) -> None:
        """The embedding rows of these texts (token ids) at once, where only such rows are kept."""
        if self.core is not None and self.core.words is not None and examples:
            self.core.words.read(torch.tensor(sorted({i for ids in examples for i in ids})))

    def cache(
        self,
        at: int,
        examples: Sequence[Sequence[int]],
        memory_mb: float,
        folder: Path | None = None,
        disk_mb: float = 0.0,
    ) -> str:
        """From now on keep what enters layer `at` for these examples (token ids); what is kept stays while
        it is valid. Says why not."""
        assert self.core is not None
        name = self._prefix_id(at)
        if self.prefix is None or self.prefix.store.name != name or not self.prefix.of(examples):
            lower = self.prefix
            if lower is not None and not (
                lower.at < at and lower.store.name == self._prefix_id(lower.at) and lower.of(examples)
            ):
                lower = None
            store = Activations(name, self.core.kind.hidden, memory_mb, folder, disk_mb)
            self.prefix = Prefix(self.core, at, store, examples, lower)
            if (need := self.prefix.bytes_needed() / 1e6) > memory_mb + disk_mb:
                self.prefix = None
                return f"it would take {need:.0f} MB, there are {memory_mb + disk_mb:.0f}"
            if lower is None and not self.prefix.complete:
                self.read_words(examples)
        return ""

    def _prefix_id(self, at: int) -> str:
        assert self.core is not None
        return prefix_id(self.sites, at, self.digest, self.bits, self.core.dtype, self.masks)

    def lighten(self) -> None:
        """Once the cache has all that will be asked for, the layers below it leave memory."""
        if self.core is not None and self.prefix is not None and self.prefix.complete:
            self.core.drop(self.prefix.at, embeddings=not self.causal or "head" in self.core.tables)

    def answers(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Of every answer token (`labels` other than `IGNORED`): loss, whether it would be guessed, the
        example that it belongs to."""
        before, owners = answer_places(batch["labels"])
        targets = batch["labels"].flatten()[before + 1].to(self.device)
        if self.core is None:
            return (*self._foreign_answers(batch, before, targets), owners)
        rows = self._rows_at(batch, before).to(self.core.dtype)
        return (*vocabulary.losses(rows, *self._table(), targets), owners)

    def choices(self, batch: dict[str, Any], tokens: Sequence[int]) -> Tensor:
        """Logits of some tokens at every answer place, (answers, tokens), fp32. Raises Refused for what is
        no causal model of ours."""
        if self.core is None or not self.causal:
            raise Refused("`choices` needs a causal model whose architecture this engine runs itself")
        before, _ = answer_places(batch["labels"])
        rows = self._rows_at(batch, before)
        table, bias = self._table()
        wanted = torch.tensor(list(tokens), device=self.device)
        logits = rows @ table.index_select(0, wanted).float().t()
        return logits if bias is None else logits + bias.index_select(0, wanted)

    def _rows_at(self, batch: dict[str, Any], places: Tensor) -> Tensor:
        """Last hidden states at flat places of the padded block, fp32."""
        x, layout = self.hidden(batch)
        number = layout.mask.flatten().cumsum(0) - 1
        return x.index_select(0, number[places].to(self.device))

    @torch.inference_mode()
    def generate(self, ids: list[int], most: int, end: int | None) -> list[int]:
        """What a causal model says after `ids`, greedily: at most so many tokens, up to and without `end`."""
        said: list[int] = []
        while len(said) < most:
            following = self._next([*ids, *said])
            if following == end:
                break
            said.append(following)
        return said

    def _next(self, ids: list[int]) -> int:
        given = torch.tensor([ids])
        if self.core is None:
            return int(
                self.model(input_ids=given.to(self.device), use_cache=False, logits_to_keep=1)
                .logits[0, -1]
                .argmax()
            )
        rows, _ = self.hidden({"input_ids": given, "attention_mask": torch.ones_like(given)})
        return int(vocabulary.guesses(rows[-1:].to(self.core.dtype), *self._table())[0])

    def _table(self) -> tuple[Tensor, Tensor | None]:
        assert self.core is not None
        tables = self.core.tables
        return tables["head" if "head" in tables else "word"], tables.get("head_bias")

    def _foreign_answers(
        self, batch: dict[str, Any], before: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        width = batch["labels"].shape[1]
        columns = (before % width).unique()
        given = {k: batch[k].to(self.device) for k in ("input_ids", "attention_mask")}
        logits = self.model(**given, use_cache=False, logits_to_keep=columns.to(self.device)).logits.float()
        logits = logits if logits.shape[1] == len(columns) else logits[:, columns]
        rows = logits[
            (before // width).to(self.device), torch.searchsorted(columns, before % width).to(self.device)
        ]
        return torch.nn.functional.cross_entropy(rows, targets, reduction="none"), rows.argmax(-1) == targets


def answer_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places in (batch, length) of the tokens before an answer token, and their examples."""
    owners, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return owners * labels.shape[1] + columns, owners


def as_tensor(array: object, device: torch.device | str = "cpu") -> Tensor:
    """A NumPy array (maybe read-only, maybe fp16) as an fp32 tensor of its own."""
    import numpy as np

    return torch.from_numpy(np.array(array, dtype=np.float32, copy=True)).to(device)
