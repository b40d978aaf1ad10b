"""The CLI's side of the HTTP API. Standard library only: a verb must start in a blink."""

import http.client
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rankfleet.federated.errors import ConfigError, RankfleetError, Unreachable

if TYPE_CHECKING:
    from ..operators.operator_key import OperatorKey


def _key(path: Path) -> "OperatorKey":
    from ..operators.operator_key import OperatorKey

    return OperatorKey(path)


class Client:
    """Speaks to the service whose data directory is `home`."""

    def __init__(self, home: Path, fleet: str = "", key: Path | None = None) -> None:
        try:
            said = json.loads((home / "api.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Unreachable(
                f"{home}: no coordinator has run here", "coordinator serve --config coordinator.yaml"
            ) from None
        self.url, self.token, self.fleet = urlsplit(said["url"]), said["token"], fleet
        self.key = _key(key) if key else None

    def get(self, path: str) -> Any:
        """The answer's data. Raises RankfleetError."""
        return self._ask("GET", path, b"")

    def post(self, path: str, body: str = "") -> Any:
        """The answer's data. Raises RankfleetError."""
        return self._ask("POST", path, body.encode())

    def send(self, path: str, body: bytes) -> Any:
        """As `post`, with bytes."""
        return self._ask("POST", path, body)

    def signed_job(self, path: str, body: str, text: str) -> Any:
        """As `post`, with the operator's signature over a job's text, where there is a key."""
        extra = {"X-Job": self.key.job(self.fleet, text)} if self.key else {}
        return self._ask("POST", path, body.encode(), extra)

    def _ask(self, verb: str, path: str, body: bytes, extra: Mapping[str, str] = MappingProxyType({})) -> Any:
        connection = http.client.HTTPConnection(self.url.hostname or "127.0.0.1", self.url.port, timeout=120)
        try:
            signed = self.key.request(self.fleet, verb, path, body) if self.key and verb != "GET" else {}
            if token := os.environ.get("RANKFLEET_TOKEN", ""):
                signed = {**signed, "X-Oidc": token}
            connection.request(verb, path, body, {"Authorization": f"Bearer {self.token}", **signed, **extra})
            answer = connection.getresponse()
            data = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(
                f"the coordinator does not answer: {error}", "is `coordinator serve` running?"
            ) from None
        finally:
            connection.close()
        if answer.status == 400:
            raise ConfigError(data["error"], data.get("hint", ""))
        if answer.status != 200:
            raise RankfleetError(
                f"the coordinator answers {answer.status}: {data.get('error', '')}", data.get("hint", "")
            )
        return data
