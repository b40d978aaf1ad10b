"""What an operator can ask of the coordinator: a module for the service, its jobs, their results, and the
fleet; each adds its verbs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rankfleet.federated.program import cli

if TYPE_CHECKING:
    from ..config import CoordinatorConfig
    from .client import Client


class AddVerb(Protocol):
    """Adds a verb to the parser: its name, what runs, help, an example, and words that stand behind it."""

    def __call__(
        self, name: str, run: cli.Command, text: str, example: str, *words: str
    ) -> argparse.ArgumentParser:
        """The verb's own parser."""
        ...


def config_of(args: argparse.Namespace) -> "CoordinatorConfig":
    """The coordinator's YAML."""
    from rankfleet.federated.program.loader import load

    from ..config import CoordinatorConfig

    return load(args.config, CoordinatorConfig)


def client_of(args: argparse.Namespace) -> "Client":
    """The running service, asked with the operator's key where there is one."""
    from .client import Client

    config = config_of(args)
    return Client(config.home, config.fleet, Path(args.key) if args.key else None)
