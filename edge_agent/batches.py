"""Which examples make a batch: a seeded permutation, in which neighbours of like length meet, so that little is padded."""

from typing import Any

import torch

WINDOW = 8
"""Batches that are sorted by length together: wider pads less and mixes less."""


def size_of(example: dict[str, Any]) -> int:
    """Tokens of an example; 1 where it has no such thing."""
    return len(example["ids"]) if "ids" in example else 1


def order(sizes: list[int], batch: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of indices. Every example comes once before any comes again; each batch holds like lengths."""
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch:
        stream += torch.randperm(len(sizes), generator=generator).tolist()
    found: list[list[int]] = []
    for at in range(0, steps * batch, WINDOW * batch):
        window = sorted(stream[at : min(at + WINDOW * batch, steps * batch)], key=lambda i: sizes[i])
        made = [window[n : n + batch] for n in range(0, len(window), batch)]
        found += [made[n] for n in torch.randperm(len(made), generator=generator).tolist()]
    return found
