"""Where a method may put functions into the model, beside or in place of low-rank pairs (hook `attach`)."""

from collections.abc import Callable
from typing import Any, Protocol

Torch = Any
Function = Callable[..., Torch]


class Places(Protocol):
    """The places of one model, for one round. Functions of several methods run in the order of the stack.

    Each gets `p`, all tensors of the point that is being looked at, by name: read them there and not from
    the outside, so that gradients, `ctx.gradient` at other points and published adapters are right. Rows
    are tokens, (rows, width), in the model's dtype: all texts of a batch one behind the other. `layout`
    knows whose they are: `batch`, `counts`, `real` (rows after these are spare), `spread(rows)` -> (batch,
    length, width), `rows_of(block)` back, `means(rows)` -> (batch, width).
    """

    seen: dict[str, Any]
    """What functions leave for `loss` and others, who find it as `ctx.seen`; of the last forward pass."""

    def before(self, name: str, f: Function) -> None:
        """`f(x, p, layout) -> x`: change the rows (rows, in) that the map `name` reads."""

    def after(self, name: str, f: Function) -> None:
        """`f(y, x, p, layout) -> y`: change the rows (rows, out) that the map `name` gives; x is what it
        read."""

    def enter(self, layer: int, f: Function) -> None:
        """`f(x, p, layout) -> x`: change the rows (rows, hidden), fp32, that enter a layer."""

    def front(self, count: int, f: Function) -> None:
        """`f(p) -> (count, hidden)`: rows that stand before every text or image; one method of a stack can
        have some. Raises Conflict."""

    def pooled(self, f: Function) -> None:
        """`f(z, p) -> z`: change the features (batch, hidden), fp32, that a classifier's or regression's
        head reads."""
