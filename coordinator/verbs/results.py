"""What a job does and leaves: rounds, arms, a live picture, versions, exports."""

import argparse
from pathlib import Path
from typing import Any

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program import cli

from . import AddVerb, client_of, config_of


def add(verb: AddVerb) -> None:
    """Its verbs."""
    verb("rounds", _rounds, "what each device did in each round", "coordinator rounds docs-1", "job")
    _add_watch(verb)
    verb(
        "arms", _arms, "arms that a job used; with `explain`, why", "coordinator arms docs-1 explain", "job"
    ).add_argument(
        "explain",
        nargs="?",
        choices=["explain"],
        help="add the reason of each choice and what the tuner believes",
    )
    versions = verb(
        "versions", _versions, "list, promote or roll back versions", "coordinator versions list docs-1"
    )
    versions.add_argument("what", choices=["list", "promote", "rollback"])
    versions.add_argument("job")
    versions.add_argument("number", nargs="?", type=int)
    _add_export(verb)


def _add_watch(verb: AddVerb) -> None:
    text = "follow a job; draw it, or write it for TensorBoard and MLflow"
    watch = verb("watch", _watch, text, "coordinator watch docs-1 --png job.png", "job")
    watch.add_argument("--png", type=Path, help="picture that is replaced after every round")
    watch.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder for TensorBoard")
    watch.add_argument("--mlflow", metavar="URI", help="MLflow server or folder")
    watch.add_argument("--once", action="store_true", help="show and write what there is, and end")


def _add_export(verb: AddVerb) -> None:
    text = "a version for other tools: peft, safetensors, ONNX, GGUF"
    export = verb("export", _export, text, "coordinator export docs-1 --to adapter/", "job")
    export.add_argument("--to", type=Path, required=True, help="folder to write")
    export.add_argument(
        "--format",
        choices=["peft", "merged", "onnx", "gguf", "gguf-merged"],
        default="peft",
        help="peft, gguf: adapter alone; merged, onnx (encoders), gguf-merged (decoders): the whole model",
    )
    export.add_argument("--version", type=int, help="version (default: the newest good one)")
    export.add_argument(
        "--ratio",
        type=float,
        default=0.0,
        help="of a whole model: cut heads and channels, as devices at this ratio do",
    )


def arm_text(arm: dict[str, Any]) -> str:
    """An arm as tables show it."""
    pruned = f" p{arm['prune']:g}" if arm.get("prune") else ""
    return f"{arm['placement']} {arm['bits']}b{pruned} x{arm['steps']}" if arm else ""


def _rounds(args: argparse.Namespace) -> int:
    answer = client_of(args).get(f"/jobs/{args.job}/rounds")
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
    told = [
        (r["round"], d["telemetry"]["samples"])
        for r in answer["rounds"]
        for d in r["devices"][:1]
        if d["telemetry"].get("samples")
    ]
    ends = [told[0], told[-1]] if len(told) > 1 else told
    return "".join(
        f"\nversion {number}, sample {n + 1}: {text!r}"
        for number, texts in ends
        for n, text in enumerate(texts)
    )


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
        return int(follow(client_of(args), args.job, wanted, once=args.once) == "failed")
    except KeyboardInterrupt:
        return 0


def _arms(args: argparse.Namespace) -> int:
    answer = client_of(args).get(f"/jobs/{args.job}/arms")
    rows = [
        {
            "round": r["round"],
            "device": r["device"],
            "arm": arm_text(r["arm"]),
            **({"why": r["why"]} if args.explain else {}),
        }
        for r in answer["used"]
    ]
    believed = "".join(f"\n{d}: {t}" for d, t in answer["tuner"].items()) if args.explain else ""
    cli.show(args, answer, cli.table(rows) + believed)
    return 0


def _versions(args: argparse.Namespace) -> int:
    client = client_of(args)
    if args.what != "list":
        if args.number is None:
            raise ConfigError(
                f"which version should be {args.what}d?", f"coordinator versions {args.what} {args.job} 3"
            )
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
    from ..export import write

    number = write(config_of(args), args.job, args.to, args.version, args.format, args.ratio)
    cli.show(
        args, {"version": number, "folder": str(args.to)}, f"version {number} of {args.job} lies in {args.to}"
    )
    return 0
