"""Methods from outside the catalogue, for one test: a class becomes a module of its own under a name."""

import sys
from types import ModuleType

import pytest

from rankfleet.federated.contract import catalogue
from rankfleet.federated.contract.method import Method


def register(monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Method]) -> None:
    """Let jobs name `kind` as `name` until the test is over."""
    module = ModuleType(f"tests.foreign_{name}")
    kind.__module__ = module.__name__
    setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(catalogue.modules(), name, module.__name__)
    monkeypatch.setattr(catalogue, "method_class", catalogue.method_class.__wrapped__)
