"""What an operator may ask of a device from afar: the last lines of its log, and what its own doctor
finds. Bounded, without secrets."""

import asyncio
import logging
import sys
from collections import deque
from pathlib import Path

from rankfleet.federated.program.logs import redacted

LINES, BYTES = 300, 48 << 10
DOCTOR_S = 60.0


class LastLines(logging.Handler):
    """The last lines of the log, in memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: deque[str] = deque(maxlen=LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(redacted(self.format(record))[:500])

    def text(self) -> str:
        """The newest that fit."""
        return bounded("\n".join(self.lines))


def bounded(text: str) -> str:
    """The end of a text, at most `BYTES` of it."""
    return text.encode()[-BYTES:].decode(errors="ignore")


async def doctor(config: Path | None) -> str:
    """What `edge-agent doctor --json` says, from a process of its own: the idle service stays small."""
    command = [
        sys.executable,
        "-m",
        "rankfleet.edge_agent",
        "doctor",
        "--json",
        *(["--config", str(config)] if config else []),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    reading = asyncio.ensure_future(process.communicate())
    await asyncio.wait({reading}, timeout=DOCTOR_S)
    if not reading.done():
        process.kill()
        await reading
        return "doctor did not end within a minute"
    return bounded(redacted(reading.result()[0].decode(errors="replace")))
