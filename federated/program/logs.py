"""Logs for people, or one JSON object a line for machines; claim tokens and passwords in addresses never
appear in either."""

import json
import logging
import re
import time
from typing import Literal

Format = Literal["text", "json"]
SECRETS = re.compile(
    r"rf1\.[A-Za-z0-9_-]{8,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)|(?i:(?<=password=)|(?<=bearer ))\S+"
)


def redacted(text: str) -> str:
    """Without what lets somebody in."""
    return SECRETS.sub("(secret)", text)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "from": record.name, "text": redacted(record.getMessage()),
        }  # fmt: skip
        if record.exc_info:
            said["trace"] = redacted(self.formatException(record.exc_info))
        return json.dumps(said, ensure_ascii=False)


def begin(kind: Format, level: int) -> None:
    """Log to standard error from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if kind == "json" else _Text("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
