"""The service itself: run it, ask how it is, carry it elsewhere."""

import argparse
import asyncio
import logging
import os
from pathlib import Path

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program import cli
from rankfleet.federated.program.logs import begin

from . import AddVerb, client_of, config_of


def add(verb: AddVerb) -> None:
    """Its verbs."""
    verb(
        "serve", _serve, "run the service with its broker", "coordinator serve --config coordinator.yaml"
    ).add_argument("--insecure", action="store_true", help="allow a broker without TLS on a network")
    verb("status", _status, "is the service well, and what is wrong if not", "coordinator status")
    verb("doctor", _doctor, "find what is set up wrong", "coordinator doctor")
    verb(
        "backup",
        _backup,
        "everything in one file; the service may run",
        "coordinator backup --to fleet.tar.gz",
    ).add_argument("--to", type=Path, required=True)
    verb(
        "restore",
        _restore,
        "a backup into an empty data_dir",
        "coordinator restore fleet.tar.gz --config coordinator.yaml",
        "file",
    )


def _serve(args: argparse.Namespace) -> int:
    config = config_of(args)
    begin(config.log, logging.WARNING)
    # Its matrices are small: a second BLAS thread slows them down, and one gives the same bits everywhere.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ..serve import serve  # after that: NumPy reads it when it is imported

    try:
        asyncio.run(serve(config, args.insecure))
    except OSError as error:
        raise ConfigError(
            f"the service cannot start: {error}", "check `data_dir`, `broker.port` and `api_port`"
        ) from None
    return 0


def _status(args: argparse.Namespace) -> int:
    said = client_of(args).get("/health")
    shown = {k: v for k, v in said.items() if k not in ("conditions", "problem")}
    wrong = cli.table(said["conditions"]) if said["conditions"] else "nothing is wrong"
    cli.show(args, said, "\n".join(f"{k:22} {v}" for k, v in shown.items()) + f"\n{wrong}")
    return int(any(c["severity"] == "error" for c in said["conditions"]))


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine(args.config)
    cli.show(args, findings)
    return 1 if any(f["state"] == "error" for f in findings) else 0


def _backup(args: argparse.Namespace) -> int:
    from ..store.backup import backup

    done = backup(config_of(args), args.to)
    cli.show(
        args,
        done,
        f"{args.to}: {done['rows']} rows, {done['files']} files, {done['bytes'] / 1e6:.1f} MB; it holds "
        "every key of the fleet",
    )
    return 0


def _restore(args: argparse.Namespace) -> int:
    from ..store.backup import restore

    done = restore(config_of(args), Path(args.file))
    cli.show(
        args,
        done,
        f"{done['rows']} rows and {done['files']} files are back; devices find it under the name that they "
        "know",
    )
    return 0
