"""One label for one image."""

from . import TaskKind

TASK = TaskKind(rows=-1, field="pixels")
