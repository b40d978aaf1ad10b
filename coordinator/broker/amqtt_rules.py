"""Who may connect to amqtt, and do what: client certificates and `access.py`, as plugins of the embedded
broker.

amqtt takes connections without a certificate, and reads no list of revoked ones; both are checked here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqtt.contexts import Action
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from cryptography import x509

from .access import allowed


@dataclass
class Settings:
    """Both plugins' configuration."""

    fleet: str
    crl: str


def user_of(session: Any) -> str:
    """Common name in the client's verified certificate; empty where there is none."""
    shown = session.ssl_object.getpeercert() if session is not None and session.ssl_object else None
    names = dict(pair for part in (shown or {}).get("subject", ()) for pair in part)
    return str(names.get("commonName", ""))


def revoked(session: Any, crl: Path) -> bool:
    """Is the client's certificate on the list? A list that cannot be read shuts everybody out."""
    serial = int(session.ssl_object.getpeercert()["serialNumber"], 16)
    try:
        listed = x509.load_pem_x509_crl(crl.read_bytes())
    except (OSError, ValueError):
        return True
    return listed.get_revoked_certificate_by_serial_number(serial) is not None


class Known(BaseAuthPlugin):  # type: ignore[misc]
    """Lets in who shows a certificate of this fleet that was not revoked."""

    Config = Settings

    async def authenticate(self, *, session: Any) -> bool:
        """amqtt's hook."""
        return bool(user_of(session)) and not revoked(session, Path(self.config.crl))


class Rules(BaseTopicPlugin):  # type: ignore[misc]
    """Every topic by `access.allowed`."""

    Config = Settings

    async def topic_filtering(
        self, *, session: Any = None, topic: str | None = None, action: Any = None
    ) -> bool:
        """amqtt's hook."""
        return allowed(
            self.config.fleet, user_of(session), topic or "", "write" if action == Action.PUBLISH else "read"
        )
