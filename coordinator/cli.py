"""`coordinator`: the service, and one verb for everything that an operator asks of it (`coordinator --help`)."""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federated import cli
from federated.errors import ConfigError
from federated.logs import begin

if TYPE_CHECKING:
    from .client import Client
    from .config import CoordinatorConfig

DEFAULT = "/etc/rankfleet/coordinator.yaml"


def build() -> argparse.ArgumentParser:
    """The parser."""
    parse = cli.parser("coordinator", "Plans and runs federated fine-tuning jobs over a fleet of small devices.")
    group = parse.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: cli.Command, text: str, example: str, *words: str) -> argparse.ArgumentParser:
        made = cli.command(group, name, run, text, example)
        made.add_argument("--config", type=Path, default=Path(DEFAULT), help=f"the coordinator's YAML (default {DEFAULT})")
        made.add_argument("--key", type=Path, default=os.environ.get("RANKFLEET_KEY"), help="the operator's key (default: $RANKFLEET_KEY)")
        for word in words:
            made.add_argument(word)
        return made

    verb("serve", _serve, "run the service with its broker", "coordinator serve --config coordinator.yaml").add_argument(
        "--insecure", action="store_true", help="allow a broker without TLS on a network"
    )
    verb(
        "submit", _submit, "validate a job, show what each device would get, and queue it", "coordinator submit job.yaml --dry-run", "job"
    ).add_argument("--dry-run", action="store_true", help="validate and show only")
    verb("status", _status, "is the service well, and what is wrong if not", "coordinator status")
    verb("jobs", _jobs, "all jobs and their state", "coordinator jobs")
    verb("approve", _approve, "sign a job that waits for another operator", "coordinator approve docs-1 --key bob.key", "job").add_argument(
        "--yes", action="store_true", help="sign it; without this it is shown"
    )
    for name, text in (("cancel", "stop a job for good"), ("pause", "open no further round"), ("resume", "go on")):
        verb(name, _change, text, f"coordinator {name} docs-1", "job")
    verb("rounds", _rounds, "what each device did in each round", "coordinator rounds docs-1", "job")
    watch = verb(
        "watch", _watch, "follow a job; draw it, or write it for TensorBoard and MLflow", "coordinator watch docs-1 --png job.png", "job"
    )
    watch.add_argument("--png", type=Path, help="picture that is replaced after every round")
    watch.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for TensorBoard")
    watch.add_argument("--mlflow", metavar="URI", help="MLflow server or folder")
    watch.add_argument("--once", action="store_true", help="show and write what there is, and end")
    _fleet_verbs(verb)
    verb("arms", _arms, "arms that a job used; with `explain`, why", "coordinator arms docs-1 explain", "job").add_argument(
        "explain", nargs="?", choices=["explain"], help="add the reason of each choice and what the tuner believes"
    )
    verb("methods", _methods, "the catalogue of federated methods", "coordinator methods").add_argument(
        "--all", action="store_true", help="also those for simulation only"
    )
    versions = verb("versions", _versions, "list, promote or roll back versions", "coordinator versions list docs-1")
    versions.add_argument("what", choices=["list", "promote", "rollback"])
    versions.add_argument("job")
    versions.add_argument("number", nargs="?", type=int)
    export = verb(
        "export",
        _export,
        "a version for other tools: peft, safetensors, ONNX, GGUF",
        "coordinator export docs-1 --to adapter/",
        "job",
    )
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument(
        "--format",
        choices=["peft", "merged", "onnx", "gguf", "gguf-merged"],
        default="peft",
        help="peft, gguf: adapter alone; merged, onnx (encoders), gguf-merged (decoders): the whole model",
    )
    export.add_argument("--version", type=int, help="version (default: the newest good one)")
    export.add_argument("--ratio", type=float, default=0.0, help="of a whole model: cut heads and channels, as devices at this ratio do")
    verb("backup", _backup, "everything in one file; the service may run", "coordinator backup --to fleet.tar.gz").add_argument(
        "--to", type=Path, required=True
    )
    verb("restore", _restore, "a backup into an empty data_dir", "coordinator restore fleet.tar.gz --config coordinator.yaml", "file")
    verb("doctor", _doctor, "find what is set up wrong", "coordinator doctor")
    return parse


def _fleet_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Who belongs to the fleet, and how they come in."""
    text = "the fleet; suspend, resume or revoke a device, fetch its log or what its doctor says"
    devices = verb("devices", _devices, text, "coordinator devices revoke kitchen-jetson")
    devices.add_argument("what", nargs="?", choices=["list", "suspend", "resume", "revoke", "logs", "doctor"], default="list")
    devices.add_argument("device", nargs="?")
    verb("invite", _invite, "a one-time claim token for a new device", "coordinator invite kitchen-jetson", "device").add_argument(
        "--qr", action="store_true", help="also as a QR code, for a device with a camera"
    )
    operators = verb("operators", _operators, "who may order what", "coordinator operators set roster.yaml --key admin.key")
    operators.add_argument("what", nargs="?", choices=["list", "keygen", "set", "audit"], default="list")
    operators.add_argument("file", nargs="?", help="keygen: the new key; set: the roster")
    broker = verb("broker", _broker, "configuration for a broker of your own", "coordinator broker config --kind emqx --to broker/")
    broker.add_argument("what", choices=["config"])
    broker.add_argument("--kind", choices=["mosquitto", "emqx"], default="mosquitto")
    broker.add_argument("--to", type=Path, required=True, help="folder to write")
    broker.add_argument("--name", action="append", default=[], help="name or address that devices reach it by; may be repeated")
    broker.add_argument("--port", type=int, default=8883)


def _config(args: argparse.Namespace) -> "CoordinatorConfig":
    from federated.loader import load

    from .config import CoordinatorConfig

    return load(args.config, CoordinatorConfig)


def _client(args: argparse.Namespace) -> "Client":
    from .client import Client

    config = _config(args)
    return Client(config.home, config.fleet, Path(args.key) if args.key else None)


def _serve(args: argparse.Namespace) -> int:
    config = _config(args)
    begin(config.log, logging.WARNING)
    # Its matrices are small: a second BLAS thread slows them down, and one gives the same bits everywhere.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .serve import serve  # after that: NumPy reads it when it is imported

    try:
        asyncio.run(serve(config, args.insecure))
    except OSError as error:
        raise ConfigError(f"the service cannot start: {error}", "check `data_dir`, `broker.port` and `api_port`") from None
    return 0


def _submit(args: argparse.Namespace) -> int:
    from federated.loader import read

    from .job import read_job_file

    read_job_file(Path(args.job))
    job = read(Path(args.job))
    answer = _client(args).signed_job("/jobs" + ("?dry=1" if args.dry_run else ""), job, job)
    text = cli.table(answer["devices"])
    held = f"\nheld as `{answer['job']}` until {answer['lacks']} more operators sign: coordinator approve {answer['job']} --key FILE"
    queued = held if answer["lacks"] else f"\nqueued as `{answer['job']}`"
    cli.show(args, answer, text + (queued if answer["job"] else "\nthe job is valid"))
    return 0


def _approve(args: argparse.Namespace) -> int:
    client = _client(args)
    text = client.get(f"/jobs/{args.job}/text")["text"]
    if not args.yes:
        print(text)
        raise ConfigError(f"this is what you would sign as job `{args.job}`", f"coordinator approve {args.job} --yes")
    answer = client.signed_job(f"/jobs/{args.job}/approve", "", text)
    waits = f"; {answer['lacks']} more must sign" if answer["lacks"] else "; it is queued"
    cli.show(args, answer, f"signed by {', '.join(answer['signed'])}{waits}")
    return 0


def _operators(args: argparse.Namespace) -> int:
    if args.what == "keygen":
        from .operator_key import generate

        if not args.file:
            raise ConfigError("where should the key lie?", "coordinator operators keygen alice.key")
        public = generate(Path(args.file))
        cli.show(args, {"key": public, "file": args.file}, f"the public half, for the roster: {public}")
        return 0
    client = _client(args)
    known = client.get("/operators")
    if args.what == "set":
        if client.key is None or not args.file:
            raise ConfigError("a roster is a file, and an admin signs it", "coordinator operators set roster.yaml --key admin.key")
        answer = client.send("/operators", client.key.roster(Path(args.file), known["fleet"], known["version"] + 1))
        cli.show(args, answer, f"version {answer['version']} is in force: {', '.join(answer['operators'])}")
        return 0
    if args.what == "audit":
        rows = [{**r, "at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r["at"]))} for r in known["audit"]]
        cli.show(args, rows)
        return 0
    rows = [{"operator": n, **o} for n, o in known["operators"].items()]
    some = f"{cli.table(rows)}\n{known['approvals']} must sign a job"
    cli.show(args, known, some if rows else "there is no roster: the token in data_dir is enough for everything")
    return 0


def _status(args: argparse.Namespace) -> int:
    said = _client(args).get("/health")
    shown = {k: v for k, v in said.items() if k not in ("conditions", "problem")}
    wrong = cli.table(said["conditions"]) if said["conditions"] else "nothing is wrong"
    cli.show(args, said, "\n".join(f"{k:22} {v}" for k, v in shown.items()) + f"\n{wrong}")
    return int(any(c["severity"] == "error" for c in said["conditions"]))


def _jobs(args: argparse.Namespace) -> int:
    rows = _client(args).get("/jobs")
    for row in rows:
        row["created"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
    cli.show(args, rows)
    return 0


def _change(args: argparse.Namespace) -> int:
    answer = _client(args).post(f"/jobs/{args.job}/{args.verb}")
    cli.show(args, answer, f"{args.verb}: {args.job}")
    return 0


def arm_text(arm: dict[str, Any]) -> str:
    """An arm as tables show it."""
    pruned = f" p{arm['prune']:g}" if arm.get("prune") else ""
    return f"{arm['placement']} {arm['bits']}b{pruned} x{arm['steps']}" if arm else ""


def _rounds(args: argparse.Namespace) -> int:
    answer = _client(args).get(f"/jobs/{args.job}/rounds")
    rows = [
        {
            "round": r["round"],
            "device": d["device"],
            "state": d["state"],
            "arm": arm_text(d["arm"]),
            "loss": d["telemetry"].get("loss_after"),
            "seconds": d["seconds"],
            "held_out": r["version"].get("devices", {}).get(d["device"]),
            "reason": d["reason"],
        }
        for r in answer["rounds"]
        for d in r["devices"]
    ]
    events = "".join(f"\n{e['device'] or 'job'}: {e['text']}" for e in answer["events"][-10:])
    cli.show(args, answer, cli.table(rows) + events + _samples(answer))
    return 0


def _samples(answer: dict[str, Any]) -> str:
    """What the first and the last measured version said to the job's own prompts."""
    told = [(r["round"], d["telemetry"]["samples"]) for r in answer["rounds"] for d in r["devices"][:1] if d["telemetry"].get("samples")]
    ends = [told[0], told[-1]] if len(told) > 1 else told
    return "".join(f"\nversion {number}, sample {n + 1}: {text!r}" for number, texts in ends for n, text in enumerate(texts))


def _watch(args: argparse.Namespace) -> int:
    from . import sinks
    from .watch import follow

    wanted: list[sinks.Sink] = []
    if args.png:
        wanted.append(sinks.Picture(args.png))
    if args.tensorboard:
        wanted.append(sinks.TensorBoard(args.tensorboard))
    if args.mlflow:
        wanted.append(sinks.MLflow(args.mlflow))
    try:
        return int(follow(_client(args), args.job, wanted, once=args.once) == "failed")
    except KeyboardInterrupt:
        return 0


def _devices(args: argparse.Namespace) -> int:
    if args.what != "list":
        if not args.device:
            raise ConfigError(f"which device, to {args.what}?", f"coordinator devices {args.what} NAME")
        answer = _client(args).post(f"/devices/{args.device}/{args.what}")
        if args.what in ("logs", "doctor"):
            cli.show(args, answer, answer["text"])
            return 0
        if args.what != "revoke":
            cli.show(args, answer, f"{args.what}: {args.device}")
            return 0
        text = f"revoked: {args.device}; `coordinator invite {args.device}` lets it in again"
        by_hand = (
            "\nyour broker must be told: give it the new crl.pem (coordinator broker config) and restart it" if answer["by_hand"] else ""
        )
        cli.show(args, answer, text + by_hand)
        return 0
    rows = _client(args).get("/devices")
    shown = [
        {
            "device": r["device"],
            "state": r["state"],
            "profile": r["profile"],
            "budget_mb": r["budget_mb"],
            "now": r["live"].get("state", "idle"),
            "certificate": time.strftime("until %Y-%m-%d", time.localtime(r["certificate_ends"])) if r["certificate_ends"] else "",
            "seen": f"{time.time() - r['seen']:.0f} s ago" if r["seen"] else "never",
            "datasets": r["datasets"],
        }
        for r in rows
    ]
    cli.show(args, rows, cli.table(shown))
    return 0


def _invite(args: argparse.Namespace) -> int:
    answer = _client(args).post(f"/devices/{args.device}/invite")
    cli.show(args, answer, answer["token"])
    if args.qr and not args.json:
        import segno

        segno.make(answer["token"]).terminal(compact=True)
    return 0


def _broker(args: argparse.Namespace) -> int:
    from .authority import Authority
    from .broker_files import write

    config = _config(args)
    written = write(Authority(config.home, config.fleet), args.kind, args.to, args.port, args.name)
    cli.show(args, {"files": [str(p) for p in written]}, "\n".join(str(p) for p in written))
    return 0


def _arms(args: argparse.Namespace) -> int:
    answer = _client(args).get(f"/jobs/{args.job}/arms")
    rows = [
        {"round": r["round"], "device": r["device"], "arm": arm_text(r["arm"]), **({"why": r["why"]} if args.explain else {})}
        for r in answer["used"]
    ]
    believed = "".join(f"\n{d}: {t}" for d, t in answer["tuner"].items()) if args.explain else ""
    cli.show(args, answer, cli.table(rows) + believed)
    return 0


def _methods(args: argparse.Namespace) -> int:
    import msgspec

    from federated.catalogue import entries

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


def _versions(args: argparse.Namespace) -> int:
    client = _client(args)
    if args.what != "list":
        if args.number is None:
            raise ConfigError(f"which version should be {args.what}d?", f"coordinator versions {args.what} {args.job} 3")
        answer = client.post(f"/jobs/{args.job}/versions/{args.number}/{args.what}")
        cli.show(args, answer, f"{args.what}: version {args.number} of {args.job}")
        return 0
    rows = client.get(f"/jobs/{args.job}/versions")
    cli.show(
        args,
        rows,
        cli.table(
            [
                {
                    "version": r["version"],
                    "state": r["state"],
                    "held_out_loss": r["metrics"].get("loss"),
                    "held_out_accuracy": r["metrics"].get("accuracy"),
                    "examples": r["metrics"].get("count"),
                    "digest": r["digest"][:12],
                }
                for r in rows
            ]
        ),
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from .export import write

    number = write(_config(args), args.job, args.to, args.version, args.format, args.ratio)
    cli.show(args, {"version": number, "folder": str(args.to)}, f"version {number} of {args.job} lies in {args.to}")
    return 0


def _backup(args: argparse.Namespace) -> int:
    from .backup import backup

    done = backup(_config(args), args.to)
    cli.show(
        args, done, f"{args.to}: {done['rows']} rows, {done['files']} files, {done['bytes'] / 1e6:.1f} MB; it holds every key of the fleet"
    )
    return 0


def _restore(args: argparse.Namespace) -> int:
    from .backup import restore

    done = restore(_config(args), Path(args.file))
    cli.show(args, done, f"{done['rows']} rows and {done['files']} files are back; devices find it under the name that they know")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine(args.config)
    cli.show(args, findings)
    return 1 if any(f["state"] == "error" for f in findings) else 0


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    cli.check_bandit()
    return cli.main(build(), words)


if __name__ == "__main__":
    sys.exit(main())
