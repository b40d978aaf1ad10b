"""Which examples make a batch: a seeded permutation, in which neighbours of like length meet, so that
little is padded."""

from collections.abc import Iterator
from typing import Any

import torch

WINDOW = 8
"""Batches that are sorted by length together: wider pads less and mixes less."""


def size_of(example: dict[str, Any]) -> int:
    """Tokens of an example; 1 where it has no such thing."""
    return len(example["ids"]) if "ids" in example else 1


def order(sizes: list[int], batch: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of indices. Every example comes once before any comes again (but for a batch between
    two epochs); like lengths meet.

    The largest batch of the first epoch comes first: what does not fit in memory shows at once, and an
    allocator that has served the largest step wastes a quarter less on all that follow.
    """
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch:
        stream += torch.randperm(len(sizes), generator=generator).tolist()
    found: list[list[int]] = []
    at = 0
    while at < steps * batch:
        # Of this epoch alone, in whole batches: two epochs that were sorted together would put an example
        # beside itself.
        rest = (-at % len(sizes) or len(sizes)) // batch * batch
        end = at + min(WINDOW * batch, max(rest, batch), steps * batch - at)
        window = sorted(stream[at:end], key=lambda i: sizes[i])
        made = [window[n : n + batch] for n in range(0, len(window), batch)]
        found += [made[n] for n in torch.randperm(len(made), generator=generator).tolist()]
        at = end
    first = range(max(1, min(steps, len(sizes) // batch)))
    largest = max(first, key=lambda n: sum(sizes[i] for i in found[n]), default=0)
    found[0], found[largest] = found[largest], found[0]
    return found


def narrowed(batch: dict[str, Any]) -> dict[str, Any]:
    """A piece of a batch without the columns that only its longer neighbours needed."""
    if "attention_mask" not in batch:
        return batch
    width = batch["attention_mask"].shape[1]
    longest = int(batch["attention_mask"].sum(1).max())
    return {k: t[:, :longest] if t.dim() > 1 and t.shape[1] == width else t for k, t in batch.items()}


def split(batch: dict[str, Any], size: int = 1) -> Iterator[dict[str, Any]]:
    """A batch in pieces of at most `size` examples."""
    for at in range(0, len(batch["labels"]), size):
        yield narrowed({k: t[at : at + size] for k, t in batch.items()})
