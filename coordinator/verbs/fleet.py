"""Who belongs to the fleet, how they come in, and who may order what."""

import argparse
import time
from pathlib import Path

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program import cli

from . import AddVerb, client_of, config_of


def add(verb: AddVerb) -> None:
    """Their verbs."""
    text = "the fleet; suspend, resume or revoke a device, fetch its log or what its doctor says"
    devices = verb("devices", _devices, text, "coordinator devices revoke kitchen-jetson")
    devices.add_argument(
        "what", nargs="?", choices=["list", "suspend", "resume", "revoke", "logs", "doctor"], default="list"
    )
    devices.add_argument("device", nargs="?")
    verb(
        "invite",
        _invite,
        "a one-time claim token for a new device",
        "coordinator invite kitchen-jetson",
        "device",
    ).add_argument("--qr", action="store_true", help="also as a QR code, for a device with a camera")
    operators = verb(
        "operators", _operators, "who may order what", "coordinator operators set roster.yaml --key admin.key"
    )
    operators.add_argument("what", nargs="?", choices=["list", "keygen", "set", "audit"], default="list")
    operators.add_argument("file", nargs="?", help="keygen: the new key; set: the roster")
    broker = verb(
        "broker",
        _broker,
        "configuration for a broker of your own",
        "coordinator broker config --kind emqx --to broker/",
    )
    broker.add_argument("what", choices=["config"])
    broker.add_argument("--kind", choices=["mosquitto", "emqx"], default="mosquitto")
    broker.add_argument("--to", type=Path, required=True, help="folder to write")
    broker.add_argument(
        "--name",
        action="append",
        default=[],
        help="name or address that devices reach it by; may be repeated",
    )
    broker.add_argument("--port", type=int, default=8883)


def _devices(args: argparse.Namespace) -> int:
    if args.what != "list":
        if not args.device:
            raise ConfigError(f"which device, to {args.what}?", f"coordinator devices {args.what} NAME")
        answer = client_of(args).post(f"/devices/{args.device}/{args.what}")
        if args.what in ("logs", "doctor"):
            cli.show(args, answer, answer["text"])
            return 0
        if args.what != "revoke":
            cli.show(args, answer, f"{args.what}: {args.device}")
            return 0
        text = f"revoked: {args.device}; `coordinator invite {args.device}` lets it in again"
        by_hand = (
            "\nyour broker must be told: give it the new crl.pem (coordinator broker config) and restart it"
            if answer["by_hand"]
            else ""
        )
        cli.show(args, answer, text + by_hand)
        return 0
    rows = client_of(args).get("/devices")
    shown = [
        {
            "device": r["device"],
            "state": r["state"],
            "profile": r["profile"],
            "budget_mb": r["budget_mb"],
            "now": r["live"].get("state", "idle"),
            "certificate": time.strftime("until %Y-%m-%d", time.localtime(r["certificate_ends"]))
            if r["certificate_ends"]
            else "",
            "seen": f"{time.time() - r['seen']:.0f} s ago" if r["seen"] else "never",
            "datasets": r["datasets"],
        }
        for r in rows
    ]
    cli.show(args, rows, cli.table(shown))
    return 0


def _invite(args: argparse.Namespace) -> int:
    answer = client_of(args).post(f"/devices/{args.device}/invite")
    cli.show(args, answer, answer["token"])
    if args.qr and not args.json:
        import segno

        segno.make(answer["token"]).terminal(compact=True)
    return 0


def _operators(args: argparse.Namespace) -> int:
    if args.what == "keygen":
        from ..operators.operator_key import generate

        if not args.file:
            raise ConfigError("where should the key lie?", "coordinator operators keygen alice.key")
        public = generate(Path(args.file))
        cli.show(args, {"key": public, "file": args.file}, f"the public half, for the roster: {public}")
        return 0
    client = client_of(args)
    known = client.get("/operators")
    if args.what == "set":
        if client.key is None or not args.file:
            raise ConfigError(
                "a roster is a file, and an admin signs it",
                "coordinator operators set roster.yaml --key admin.key",
            )
        answer = client.send(
            "/operators", client.key.roster(Path(args.file), known["fleet"], known["version"] + 1)
        )
        cli.show(args, answer, f"version {answer['version']} is in force: {', '.join(answer['operators'])}")
        return 0
    if args.what == "audit":
        rows = [
            {**r, "at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(r["at"]))} for r in known["audit"]
        ]
        cli.show(args, rows)
        return 0
    rows = [{"operator": n, **o} for n, o in known["operators"].items()]
    some = f"{cli.table(rows)}\n{known['approvals']} must sign a job"
    cli.show(
        args, known, some if rows else "there is no roster: the token in data_dir is enough for everything"
    )
    return 0


def _broker(args: argparse.Namespace) -> int:
    from ..broker.own_broker import write
    from ..fleet.authority import Authority

    config = config_of(args)
    written = write(Authority(config.home, config.fleet), args.kind, args.to, args.port, args.name)
    cli.show(args, {"files": [str(p) for p in written]}, "\n".join(str(p) for p in written))
    return 0
