"""Answers of a causal language model."""

from . import TaskKind

TASK = TaskKind(rows=0, causal=True, field="instruction")
