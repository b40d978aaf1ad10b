"""Jobs: submit, approve, stop, list."""

import argparse
import time
from pathlib import Path

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program import cli

from . import AddVerb, client_of


def add(verb: AddVerb) -> None:
    """Their verbs."""
    text = "validate a job, show what each device would get, and queue it"
    verb("submit", _submit, text, "coordinator submit job.yaml --dry-run", "job").add_argument(
        "--dry-run", action="store_true", help="validate and show only"
    )
    verb("jobs", _jobs, "all jobs and their state", "coordinator jobs")
    verb(
        "approve",
        _approve,
        "sign a job that waits for another operator",
        "coordinator approve docs-1 --key bob.key",
        "job",
    ).add_argument("--yes", action="store_true", help="sign it; without this it is shown")
    for name, text in (
        ("cancel", "stop a job for good"),
        ("pause", "open no further round"),
        ("resume", "go on"),
    ):
        verb(name, _change, text, f"coordinator {name} docs-1", "job")
    verb("methods", _methods, "the catalogue of federated methods", "coordinator methods").add_argument(
        "--all", action="store_true", help="also those for simulation only"
    )


def _submit(args: argparse.Namespace) -> int:
    from rankfleet.federated.program.loader import read

    from ..jobs.spec import read_job_file

    read_job_file(Path(args.job))
    job = read(Path(args.job))
    answer = client_of(args).signed_job("/jobs" + ("?dry=1" if args.dry_run else ""), job, job)
    text = cli.table(answer["devices"])
    name, lacks = answer["job"], answer["lacks"]
    held = f"\nheld as `{name}` until {lacks} more operators sign: coordinator approve {name} --key FILE"
    queued = held if lacks else f"\nqueued as `{name}`"
    cli.show(args, answer, text + (queued if answer["job"] else "\nthe job is valid"))
    return 0


def _approve(args: argparse.Namespace) -> int:
    client = client_of(args)
    text = client.get(f"/jobs/{args.job}/text")["text"]
    if not args.yes:
        print(text)
        raise ConfigError(
            f"this is what you would sign as job `{args.job}`", f"coordinator approve {args.job} --yes"
        )
    answer = client.signed_job(f"/jobs/{args.job}/approve", "", text)
    waits = f"; {answer['lacks']} more must sign" if answer["lacks"] else "; it is queued"
    cli.show(args, answer, f"signed by {', '.join(answer['signed'])}{waits}")
    return 0


def _jobs(args: argparse.Namespace) -> int:
    rows = client_of(args).get("/jobs")
    for row in rows:
        row["created"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
    cli.show(args, rows)
    return 0


def _change(args: argparse.Namespace) -> int:
    answer = client_of(args).post(f"/jobs/{args.job}/{args.verb}")
    cli.show(args, answer, f"{args.verb}: {args.job}")
    return 0


def _methods(args: argparse.Namespace) -> int:
    import msgspec

    from rankfleet.federated.contract.catalogue import entries

    rows = [e for e in entries() if args.all or e.evidence != "simulation only"]
    cli.show(
        args,
        [msgspec.to_builtins(e) for e in rows],
        cli.table(
            [
                {
                    "name": e.name,
                    "family": e.family,
                    "space": e.space,
                    "evidence": e.evidence,
                    "hooks": " ".join(e.hooks),
                    "use when": e.use_when,
                }
                for e in rows
            ]
        ),
    )
    return 0
