"""rankfleet tunes one language model on many small machines without moving their data.

Everything is imported as `rankfleet.<folder>`; in a checkout the folders stand beside this one and are
linked into it. What the author of a method needs stands here: `from rankfleet import Method, StepContext`.
Nothing is imported before it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .federated.version import VERSION

if TYPE_CHECKING:
    from .federated.contract.contexts import Adapter as Adapter
    from .federated.contract.contexts import Arrival as Arrival
    from .federated.contract.contexts import Ask as Ask
    from .federated.contract.contexts import ClientContext as ClientContext
    from .federated.contract.contexts import Member as Member
    from .federated.contract.contexts import Round as Round
    from .federated.contract.contexts import ServerContext as ServerContext
    from .federated.contract.contexts import StepContext as StepContext
    from .federated.contract.contexts import Tensor as Tensor
    from .federated.contract.contexts import Torch as Torch
    from .federated.contract.method import Method as Method
    from .federated.contract.places import Places as Places
    from .federated.contract.spec import Dense as Dense
    from .federated.contract.spec import Pair as Pair
    from .federated.contract.spec import Spec as Spec
    from .federated.contract.tensors import Array as Array
    from .federated.contract.tensors import Tensors as Tensors
    from .federated.contract.update import LowRank as LowRank
    from .federated.contract.update import Update as Update

__version__ = VERSION
_HOMES: dict[str, tuple[str, ...]] = {
    "contexts": (
        "Adapter",
        "Arrival",
        "Ask",
        "ClientContext",
        "Member",
        "Round",
        "ServerContext",
        "StepContext",
        "Tensor",
        "Torch",
    ),
    "method": ("Method",),
    "places": ("Places",),
    "spec": (
        "Dense",
        "Pair",
        "Spec",
    ),
    "tensors": (
        "Array",
        "Tensors",
    ),
    "update": (
        "LowRank",
        "Update",
    ),
}
_WHERE = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"rankfleet has no `{name}`; it has {', '.join(sorted(_WHERE))}")
    return getattr(importlib.import_module(f".federated.contract.{_WHERE[name]}", __name__), name)
