"""Fixtures that several rooms use: small models made from a config, small data, a fleet in one process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest

from tests import world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a word tokenizer, saved as safetensors."""
    return world.tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer for 8x8 digits."""
    return world.tiny_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def shared() -> Path:
    """The folder of shared data and models; skips where it is absent."""
    folder = Path(__file__).parent.parent.parent / "shared"
    if not folder.exists():
        pytest.skip("../shared is absent")
    return folder
