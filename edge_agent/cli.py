"""`edge-agent`: run, enroll, status, infer, doctor, probe, leave."""

import argparse
import asyncio
import itertools
import json
import logging
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program import cli
from rankfleet.federated.program.logs import begin
from rankfleet.federated.program.within import within

DEFAULT = "/etc/edge-agent/agent.yaml"


def build() -> argparse.ArgumentParser:
    """The parser."""
    parse = cli.parser(
        "edge-agent", "Trains an adapter on this device when a coordinator asks; no example ever leaves it."
    )
    group = parse.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, run, text, example in (
        ("run", _run, "run the service", "edge-agent run --config agent.yaml"),
        (
            "enroll",
            _enroll,
            "join a fleet with a claim token",
            "edge-agent enroll rf1.lqRtYWlu… --config agent.yaml",
        ),
        ("status", _status, "what the service is doing", "edge-agent status --json"),
        ("infer", _infer, "ask the current model", 'edge-agent infer "where is my parcel?"'),
        ("doctor", _doctor, "find what is set up wrong", "edge-agent doctor --config agent.yaml"),
        ("probe", _probe, "what this device is, and which profile fits", "edge-agent probe --kernels"),
        ("leave", _leave, "leave the fleet and remove everything of ours", "edge-agent leave --yes"),
    ):
        made = cli.command(group, name, run, text, example)
        made.add_argument(
            "--config", type=Path, default=Path(DEFAULT), help=f"the agent's YAML (default {DEFAULT})"
        )
        if name == "enroll":
            made.add_argument("token", help="the line that `coordinator invite` printed")
            made.add_argument(
                "--again", action="store_true", help="replace an earlier enrolment; adapter and cache stay"
            )
            made.add_argument(
                "--no-probe", action="store_true", help="do not time the kernels of every precision"
            )
        if name == "infer":
            made.add_argument(
                "text",
                nargs="*",
                help="inputs; none: lines of standard input, text or JSON objects of the task's fields",
            )
            made.add_argument(
                "--model",
                type=Path,
                help="folder of an adapter or of an export (default: the current adapter)",
            )
        if name == "probe":
            made.add_argument(
                "--kernels", action="store_true", help="time a real kernel for every precision (loads torch)"
            )
        if name == "leave":
            made.add_argument(
                "--yes", action="store_true", help="really remove identity, adapter, outbox and cache"
            )
        if name == "run":
            made.add_argument("--verbose", action="store_true", help="log more")
    return parse


def _config(args: argparse.Namespace) -> Any:
    from rankfleet.federated.program.loader import load

    from .config import AgentConfig

    return load(args.config, AgentConfig)


def _run(args: argparse.Namespace) -> int:
    from rankfleet.federated.program.platform_lock import hold
    from rankfleet.federated.transport.mqtt import MqttBus

    from .machine import probe
    from .service import Agent
    from .supervise.guard import Guard, GuardedEngine, told
    from .supervise.process import ProcessEngine
    from .trust import identity

    config = _config(args)
    begin(config.log, logging.INFO if args.verbose else logging.WARNING)
    who = identity.load(config.home)
    hold(config.home, "edge-agent")
    profile, bits_ms = _known(config, probe)
    bus = MqttBus(
        config.link.broker or who.broker, f"rf-{who.fleet}-{who.device}", keepalive_s=config.link.keepalive_s,
        packet=config.link.packet_bytes, tls=_tls(config), proxy=config.link.proxy,
    )  # fmt: skip
    engine = GuardedEngine(
        ProcessEngine(memory_mb=config.worker.memory_mb, idle_s=config.worker.idle_s), Guard(config.guard)
    )
    agent = Agent(who, config, bus, engine, profile, bits_ms)
    engine.tell = told(agent.status)
    agent.config_path = args.config
    asyncio.run(_serve(agent))
    return 0


def _tls(config: Any) -> Any:
    """The TLS context that the YAML asks for, or the certificate from enrolment; None: the system's."""
    from rankfleet.federated.transport.address import tls_context

    from .trust import certificate

    link = config.link
    if link.ca_file or link.cert_file:
        return tls_context(link.ca_file, link.cert_file, link.key_file)
    return certificate.context(config.home)


def _known(config: Any, probe: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The profile as plain data, and kernel times from the last `probe --kernels`."""
    import msgspec

    try:
        profile = msgspec.to_builtins(probe.profile(config))
    except KeyError:
        from rankfleet.profiles.device import library

        raise ConfigError(
            f"profile `{config.profile}` is not known", f"auto, or one of {', '.join(library())}"
        ) from None
    saved = config.home / "kernels.json"
    return profile, json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}


async def _serve(agent: Any) -> None:
    from rankfleet.federated.program.metrics import MetricsServer
    from rankfleet.federated.program.notify import alive, notify

    from . import health

    agent.conditions = lambda: health.conditions(agent)
    metrics = MetricsServer(lambda: health.exposition(agent))
    if agent.config.metrics.port is not None:
        await metrics.start(agent.config.metrics.host, agent.config.metrics.port)
    task = asyncio.create_task(agent.run(), name="agent")
    living = asyncio.create_task(
        alive(lambda: f"{agent.status['state']} {agent.status.get('job', '')}".strip()), name="notify"
    )
    loop = asyncio.get_running_loop()
    for name in ("SIGTERM", "SIGINT"):
        if sys.platform != "win32":
            loop.add_signal_handler(getattr(signal, name), task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return
    finally:
        living.cancel()
        await metrics.stop()
        notify("STOPPING=1")


def _enroll(args: argparse.Namespace) -> int:
    from .trust import identity

    config = _config(args)
    who = identity.enroll(args.token, config.home, args.again)
    if not args.no_probe:
        _time_kernels(config)
    cli.show(
        args,
        {"device": who.device, "fleet": who.fleet, "broker": who.broker},
        f"enrolled as `{who.device}` in fleet `{who.fleet}`; start it with: edge-agent run --config "
        f"{args.config}",
    )
    return 0


def _read_status(home: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((home / "status.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        raise ConfigError(f"{home}: the service has not run here", "edge-agent run") from None


def _status(args: argparse.Namespace) -> int:
    import psutil

    status = _read_status(_config(args).home)
    status["running"] = psutil.pid_exists(int(status.get("pid", 0))) and status["state"] != "stopped"
    status["age_s"] = round(time.time() - float(status["at"]), 1)
    cli.show(args, status)
    return 0


def _infer(args: argparse.Namespace) -> int:
    from .config import AgentConfig
    from .infer import rows_of, runtime

    config = AgentConfig() if args.model is not None and not args.config.exists() else _config(args)
    found = runtime(config, args.model)
    lines = args.text or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for line, answer in zip(lines, found.answers(rows_of(found.task, lines)), strict=True):
        if args.json:
            print(json.dumps(answer, ensure_ascii=False))
        elif "shares" in answer:
            print(
                "  ".join(f"{100 * share:.1f}% {label}" for label, share in answer["shares"].items())
                + f"  | {line[:60]}"
            )
        else:
            print(next(iter(answer.values())))
    return 0


def _time_kernels(config: Any) -> dict[str, float]:
    """Time a real kernel for every precision and keep the result; jobs take the fastest that fits."""
    from rankfleet.federated.program.files import write_atomic

    from .machine import probe

    where = config.worker.accelerator if config is not None else "auto"
    found = probe.kernels_in_child(probe.profile(config).threads if config is not None else 1, where)
    if found and config is not None:
        write_atomic(config.home / "kernels.json", json.dumps(found).encode())
    return found


def _probe(args: argparse.Namespace) -> int:
    from .machine import probe

    found = probe.facts()
    config = _config(args) if args.config.exists() else None
    if config is not None:
        found["profile"] = probe.profile(config).name
    if args.kernels:
        found["kernel_ms"] = _time_kernels(config)
    cli.show(args, found)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine

    findings = examine(args.config)
    cli.show(args, findings)
    return 1 if any(f["state"] == "error" for f in findings) else 0


def _is_agent(words: list[str]) -> bool:
    """Is this the command line of an agent: `edge-agent`, `rankfleet agent` or `python -m
    rankfleet.edge_agent`?"""
    umbrella = any(
        Path(first).stem == "rankfleet" and second == "agent" for first, second in itertools.pairwise(words)
    )
    return umbrella or any("edge_agent" in word or "edge-agent" in word for word in words)


def _end_service(home: Path) -> None:
    """A service that still runs would write into the folder that is being emptied."""
    import psutil

    try:
        service = psutil.Process(int(_read_status(home)["pid"]))
        if _is_agent(service.cmdline()):
            service.terminate()
            service.wait(15)
    except (ConfigError, psutil.Error, KeyError, ValueError):
        return


def _leave(args: argparse.Namespace) -> int:
    from rankfleet.federated.transport.mqtt import MqttBus
    from rankfleet.federated.transport.topics import Topics
    from rankfleet.federated.wire.messages import Leave, seal

    from .trust import identity

    config = _config(args)
    if not args.yes:
        raise ConfigError(
            f"this removes identity, adapter, outbox and cache in {config.home}", "edge-agent leave --yes"
        )
    _end_service(config.home)
    told = False
    if (config.home / "identity.json").exists():
        who = identity.load(config.home)

        async def tell() -> None:
            url = config.link.broker or who.broker
            bus = MqttBus(
                url, f"rf-{who.fleet}-{who.device}-leave", tls=_tls(config), proxy=config.link.proxy
            )
            await bus.start()
            try:
                message = seal(Leave(), who.device, who.link_key)
                await within(5, bus.publish(Topics(who.fleet).device(who.device, "up"), message))
            finally:
                await bus.stop()

        try:
            asyncio.run(tell())
            told = True
        except asyncio.TimeoutError:
            told = False
    for path in list(config.home.iterdir()) if config.home.exists() else []:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    cli.show(
        args,
        {"removed": str(config.home), "coordinator_told": told},
        f"nothing of ours is left in {config.home}" + ("" if told else "; the coordinator could not be told"),
    )
    return 0


def main(words: list[str] | None = None) -> int:
    """Entry point."""
    return cli.main(build(), words)


if __name__ == "__main__":
    sys.exit(main())
