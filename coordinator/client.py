"""The CLI's side of the HTTP API. Standard library only: a verb must start in a blink."""

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from federated.errors import ConfigError, RankfleetError, Unreachable


class Client:
    """Speaks to the service whose data directory is `home`."""

    def __init__(self, home: Path) -> None:
        try:
            said = json.loads((home / "api.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise Unreachable(f"{home}: no coordinator has run here", "coordinator serve --config coordinator.yaml") from None
        self.url, self.token = urlsplit(said["url"]), said["token"]

    def get(self, path: str) -> Any:
        """The answer's data. Raises RankfleetError."""
        return self._ask("GET", path, b"")

    def post(self, path: str, body: str = "") -> Any:
        """The answer's data. Raises RankfleetError."""
        return self._ask("POST", path, body.encode())

    def _ask(self, verb: str, path: str, body: bytes) -> Any:
        connection = http.client.HTTPConnection(self.url.hostname or "127.0.0.1", self.url.port, timeout=30)
        try:
            connection.request(verb, path, body, {"Authorization": f"Bearer {self.token}"})
            answer = connection.getresponse()
            data = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"the coordinator does not answer: {error}", "is `coordinator serve` running?") from None
        finally:
            connection.close()
        if answer.status == 400:
            raise ConfigError(data["error"], data.get("hint", ""))
        if answer.status != 200:
            raise RankfleetError(f"the coordinator answers {answer.status}: {data.get('error', '')}", data.get("hint", ""))
        return data
