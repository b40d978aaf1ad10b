"""Prometheus metrics in its text format, and a server of a few lines for them: the idle agent must not
load a web framework."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta


class Metrics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prometheus metrics, as plain HTTP under `/metrics`."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """None: no metrics are served; 0 takes a free port."""


Sample = tuple[str, Mapping[str, str], float]
"""Name, labels, value."""
MOST, PATIENCE_S = 8192, 5.0


def text(prefix: str, help_texts: Mapping[str, tuple[str, str]], samples: Iterable[Sample]) -> str:
    """The exposition format: `help_texts` maps a name to (counter or gauge, what it is)."""
    lines: list[str] = []
    told: set[str] = set()
    for name, labels, value in sorted(samples, key=lambda s: (s[0], sorted(s[1].items()))):
        if name not in told:
            kind, what = help_texts[name]
            lines += [f"# HELP {prefix}_{name} {what}", f"# TYPE {prefix}_{name} {kind}"]
            told.add(name)
        inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in sorted(labels.items()))
        lines.append(f"{prefix}_{name}{{{inside}}} {value:g}" if inside else f"{prefix}_{name} {value:.15g}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class MetricsServer:
    """Answers `GET /metrics` with what `make` gives, and everything else with 404."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make = make
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_server(self._answer, host, port, limit=MOST)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """No longer."""
        if self._server:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asking = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
            await asyncio.wait({asking}, timeout=PATIENCE_S)
            if not asking.done():
                asking.cancel()
                return
            words = asking.result().split(b"\r\n", 1)[0].split()
            found = len(words) > 1 and words[0] == b"GET" and words[1].split(b"?")[0] == b"/metrics"
            body = self._make().encode() if found else b"try /metrics\n"
            state = "200 OK" if found else "404 Not Found"
            head = f"HTTP/1.1 {state}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
