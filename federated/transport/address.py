"""Where a broker is and how it is reached: its address, TLS files, a proxy. What people type, checked."""

import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from ..errors import ConfigError

PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}


class BrokerURL(msgspec.Struct, frozen=True):
    """`mqtt[s]://[user:password@]host[:port]`, or `ws[s]://…/path`."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""
    path: str = "/mqtt"


def parse_url(url: str) -> BrokerURL:
    """Raises ConfigError for anything that is not a broker's address."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker address {url!r}: {error}", "mqtt://host:1883") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise ConfigError(
            f"broker address {url!r} is not understood", "mqtt://host:1883, mqtts://, ws:// or wss://"
        )
    return BrokerURL(
        parts.scheme,
        parts.hostname,
        port or PORTS[parts.scheme],
        unquote(parts.username or ""),
        unquote(parts.password or ""),
        parts.path or "/mqtt",
    )


def without_password(url: str) -> str:
    """The address as it may be shown and logged."""
    parts = urlsplit(url)
    host = f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    return parts._replace(netloc=f"{parts.username}@{host}" if parts.username else host).geturl()


def tls_context(ca_file: str = "", cert_file: str = "", key_file: str = "") -> ssl.SSLContext:
    """TLS with the system's authorities or `ca_file`, and a client certificate if there is one. Raises
    ConfigError."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
        if cert_file:
            context.load_cert_chain(cert_file, key_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS files {ca_file or 'of the system'} {cert_file}: {error}",
            "PEM files that this user may read",
        ) from None
    return context


def parse_proxy(url: str) -> dict[str, Any]:
    """`http://[user:password@]host:port` or `socks5://…` as paho takes it. Raises ConfigError."""
    try:
        import socks
    except ImportError:
        raise ConfigError("a proxy needs PySocks", "pip install PySocks") from None
    parts = urlsplit(url)
    kinds = {"http": socks.HTTP, "socks5": socks.SOCKS5}
    if parts.scheme not in kinds or not parts.hostname or not parts.port:
        raise ConfigError(
            f"proxy {without_password(url)!r} is not understood",
            "http://user:password@host:3128 or socks5://host:1080",
        )
    return {
        "proxy_type": kinds[parts.scheme],
        "proxy_addr": parts.hostname,
        "proxy_port": parts.port,
        "proxy_username": unquote(parts.username) if parts.username else None,
        "proxy_password": unquote(parts.password) if parts.password else None,
    }
