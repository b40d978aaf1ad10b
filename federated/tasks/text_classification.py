"""One label for one text."""

from . import TaskKind

TASK = TaskKind(rows=-1)
