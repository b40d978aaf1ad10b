"""The forward pass of every family that the engine runs itself, from any layer to any other, over rows of
real tokens.

The residual stream is fp32; maps and attention run in `dtype`. Norms, embeddings and base are frozen, and
nothing is dropped out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, scaled_dot_product_attention

from rankfleet.federated.errors import Refused
from rankfleet.profiles.architecture import Architecture
from rankfleet.profiles.memory import SHORT

from .ops.adapted import Site, apply
from .ops.attention import attention
from .ops.checkpointing import again
from .ops.layout import Layout
from .ops.steps import activated, gated, rms_norm, rotate
from .places import Attached
from .stored.words import Words

Norm = tuple[Tensor, Tensor | None]
Pair = tuple[Site, Tensor | None, Tensor | None, float]


class Layer:
    """One layer's maps and norms; heads and channels may be fewer than in the checkpoint."""

    def __init__(
        self, qkv: Sequence[Site], o: Site, wide: Sequence[Site], down: Site, norms: dict[str, Norm]
    ) -> None:
        self.qkv, self.o, self.wide, self.down, self.norms = qkv, o, wide, down, norms

    @property
    def sites(self) -> list[Site]:
        """All maps."""
        return [*self.qkv, self.o, *self.wide, self.down]


class Transformer:
    """Embeddings and layers. What a cache makes superfluous can be dropped; it is read again when it is
    needed after all."""

    def __init__(
        self, kind: Architecture, tables: Callable[[], dict[str, Tensor]],
        layers: Sequence[Callable[[], Layer]], norms: dict[str, Norm],
        words: Words | None = None,
    ) -> None:  # fmt: skip
        self.kind, self.norms, self._tables, self._sources, self.words = kind, norms, tables, layers, words
        self.layers: list[Layer | None] = [make() for make in layers]
        self.tables = tables()
        self.dtype = torch.float32
        self.places: Attached | None = None
        """Functions that methods put in, where there are any."""
        self.device = self.tables["word"].device
        self.checkpointing = False
        self.seen: dict[str, Tensor] | None = None
        """Where it is a dictionary: sums of squares of what enters o and down, by the map's name."""
        self._angles: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def layer(self, number: int) -> Layer:
        """A layer, read again if it was dropped."""
        found = self.layers[number]
        if found is None:
            found = self.layers[number] = self._sources[number]()
        return found

    def drop(self, below: int, embeddings: bool) -> None:
        """Let go of the layers under `below`, and of the embeddings where they are no output table."""
        for number, layer in enumerate(self.layers[:below]):
            if layer is not None:
                for site in layer.sites:
                    site.base.tensors = {}
            self.layers[number] = None
        if embeddings:
            self.tables = {k: t for k, t in self.tables.items() if k.startswith("head")}
            if self.words is not None:
                self.words.forget()

    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        """Token ids (batch, length) → rows (n, hidden) that the first layer reads."""
        if "word" not in self.tables:
            self.tables = self._tables()
        taken = layout.take(ids.flatten())
        x = (
            self.tables["word"].index_select(0, taken) if self.words is None else self.words.take(taken)
        ).float()
        if self.kind.word_scale != 1.0:
            x = x * self.kind.word_scale
        if "position" in self.tables:
            if (room := self.tables["position"].shape[0] - self.kind.offset) < layout.length:
                raise Refused(
                    f"a text has {layout.length} tokens, the model takes {room}",
                    "lower the task's `max_length`",
                )
            x = x + self.tables["position"].index_select(0, layout.positions + self.kind.offset)
        if "kind" in self.tables:
            x = x + self.tables["kind"][0]
        return self._norm(x, self.norms["norm0"]) if "norm0" in self.norms else x

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, channels, height, width) → rows (batch·tokens, hidden): every patch, behind the
        first token of each image."""
        if "word" not in self.tables:
            self.tables = self._tables()
        patches = (
            conv2d(pixels, self.tables["word"].float(), self.tables["word_bias"], stride=self.kind.patch)
            .flatten(2)
            .transpose(1, 2)
        )
        first = self.tables["first"].expand(patches.shape[0], -1, -1)
        return (torch.cat([first, patches], dim=1) + self.tables["position"]).flatten(0, 1)

    def run(self, x: Tensor, layout: Layout, first: int = 0, last: int | None = None) -> Tensor:
        """Layers `first` to `last` (not included) on rows (n, hidden)."""
        for number in range(first, self.kind.layers if last is None else last):
            layer = self.layer(number)
            factors = [f for s in layer.sites for a, b, _ in s.pairs() for f in (a, b) if f.requires_grad]
            if self.places is not None:
                x = self._layer(self.places.entering(x, number, layout), layout, layer)
            elif self.checkpointing and torch.is_grad_enabled() and (x.requires_grad or factors):
                pairs = [
                    (s, s.A, s.B, s.scale) for s in layer.sites
                ]  # by the way back, the model may compute at another point
                x = again(lambda x, layer=layer, pairs=pairs: self._at(pairs, x, layout, layer), x, factors)  # type: ignore[misc]
            else:
                x = self._layer(x, layout, layer)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The norm behind the last layer, where there is one."""
        return self._norm(x, self.norms["final"]) if "final" in self.norms else x

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        weight, bias = norm
        if self.kind.rms:
            return rms_norm(x, weight, self.kind.eps)
        return layer_norm(x, (x.shape[-1],), weight, bias, self.kind.eps)

    def _at(self, pairs: Sequence[Pair], x: Tensor, layout: Layout, layer: Layer) -> Tensor:
        """A layer with these pairs in it, whatever is in it now."""
        now = [(s, s.A, s.B, s.scale) for s, *_ in pairs]
        try:
            _set(pairs)
            return self._layer(x, layout, layer)
        finally:
            _set(now)

    def _layer(self, x: Tensor, layout: Layout, layer: Layer) -> Tensor:
        if self.kind.post:
            x = self._norm(x + self._attention(x.to(self.dtype), layout, layer), layer.norms["norm1"])
            return self._norm(x + self._wide(x.to(self.dtype), layout, layer), layer.norms["norm2"])
        read = self._norm(x, layer.norms["norm1"]).to(self.dtype)
        if self.kind.parallel:
            return x + self._attention(read, layout, layer) + self._wide(read, layout, layer)
        x = x + self._attention(read, layout, layer)
        return x + self._wide(self._norm(x, layer.norms["norm2"]).to(self.dtype), layout, layer)

    def _wide(self, x: Tensor, layout: Layout, layer: Layer) -> Tensor:
        found = self._apply(x, layer.wide, layout)
        name = self.kind.activation
        middle = gated(found[0], found[1], name) if len(found) == 2 else activated(found[0], name)
        return self._out(middle, layout, layer.down)

    def _out(self, x: Tensor, layout: Layout, site: Site) -> Tensor:
        if self.seen is not None:
            squares = x[: layout.real].float().square().sum(0)
            self.seen[site.name] = self.seen[site.name] + squares if site.name in self.seen else squares
        return self._apply(x, [site], layout)[0]

    def _apply(self, x: Tensor, sites: Sequence[Site], layout: Layout) -> list[Tensor]:
        return apply(x, sites) if self.places is None else self.places.apply(x, sites, layout)

    def _attention(self, x: Tensor, layout: Layout, layer: Layer) -> Tensor:
        size = self.kind.head_size
        found = self._apply(x, layer.qkv, layout)
        if len(found) == 1:
            found = list(found[0].chunk(3, dim=-1))
        q, k, v = (t.reshape(t.shape[0], -1, size) for t in found)
        if "q_norm" in layer.norms:
            q, k = (
                self._norm(t.float(), layer.norms[n]).to(x.dtype) for t, n in ((q, "q_norm"), (k, "k_norm"))
            )
        if self.kind.theta:
            cos, sin = (
                t.index_select(0, layout.positions).unsqueeze(1) for t in self._turns(layout.length, x.dtype)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if layout.length <= SHORT:
            hidden = layout.hidden(self.kind.causal, self.kind.window, q.shape[1] // k.shape[1])
            seen = attention(
                q.float(), k.float(), v.float(), layout, hidden
            )  # small products: 16 bits would only slow them down
            return self._out(seen.to(x.dtype), layout, layer.o)
        q, k, v = (layout.spread(t).transpose(1, 2) for t in (q, k, v))
        if q.shape[1] != k.shape[1]:
            k, v = (_repeated(t, q.shape[1] // t.shape[1]) for t in (k, v))
        mask = self._mask(layout)
        seen = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.kind.causal and mask is None
        )
        return self._out(layout.rows_of(seen.transpose(1, 2).flatten(2)), layout, layer.o)

    def _mask(self, layout: Layout) -> Tensor | None:
        """None where nothing is hidden, or only what comes later: padding stands on the right."""
        if not self.kind.causal:
            return layout.seen
        if not self.kind.window or layout.length <= self.kind.window:
            return None
        at = torch.arange(layout.length, device=self.device)
        back = at.unsqueeze(1) - at.unsqueeze(0)
        return ((back >= 0) & (back < self.kind.window))[None, None]

    def _turns(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position and rotating pair, (length, rotary / 2)."""
        if (length, dtype) not in self._angles:
            half = torch.arange(0, self.kind.rotary, 2, dtype=torch.float32) / self.kind.rotary
            angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / self.kind.theta**half)
            if len(self._angles) > 64:
                self._angles.clear()
            self._angles[length, dtype] = (
                angles.cos().to(self.device, dtype),
                angles.sin().to(self.device, dtype),
            )
        return self._angles[length, dtype]


def _set(pairs: Sequence[Pair]) -> None:
    for site, a, b, scale in pairs:
        site.A, site.B, site.scale = a, b, scale


def _repeated(x: Tensor, times: int) -> Tensor:
    """Key or value heads (batch, kv, length, size), each for the queries of its group."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)
