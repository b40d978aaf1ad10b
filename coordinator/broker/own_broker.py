"""`coordinator broker config`: everything that a broker of one's own needs, in one folder."""

from pathlib import Path

from rankfleet.federated.errors import ConfigError
from rankfleet.federated.program.files import write_atomic

from ..fleet.authority import Authority, own_names
from . import access


def write(authority: Authority, kind: str, to: Path, port: int, names: list[str]) -> list[Path]:
    """Configuration, rules, the broker's certificate and key, the authority and the list of revoked
    devices. Raises ConfigError."""
    authority.ensure_crl()
    cert, key = authority.broker([*names, *own_names()])
    found = {
        "ca.pem": authority.ca.read_bytes(), "crl.pem": authority.crl.read_bytes(),
        "broker.pem": cert.read_bytes(), "broker.key": key.read_bytes(),
    }  # fmt: skip
    to = to.resolve()
    files = access.Files(to / "ca.pem", to / "broker.pem", to / "broker.key", to / "crl.pem")
    if kind == "mosquitto":
        found["mosquitto.conf"] = access.mosquitto_config(port, "", files, to / "rules.acl").encode()
        found["rules.acl"] = access.mosquitto_rules(authority.fleet).encode()
    else:
        found["emqx.conf"] = access.emqx_config(port, files, to / "acl.conf").encode()
        found["acl.conf"] = access.emqx_rules(authority.fleet).encode()
    try:
        for name, data in found.items():
            write_atomic(to / name, data, 0o600 if name.endswith(".key") else 0o644)
    except OSError as error:
        raise ConfigError(f"{to}: {error.strerror}", "name a folder that you may write") from None
    return [to / name for name in sorted(found)]
