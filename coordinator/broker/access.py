"""Who may read and write which topic, in one place, and the same rules as Mosquitto and EMQX want them.

The user's name is the common name of the client certificate. A device writes and reads its own topics and
reads blobs (parts of the global adapter, named by digest); the coordinator may do everything within its
fleet; nobody else anything.
"""

import os
from pathlib import Path
from typing import Literal

from rankfleet.federated.transport.topics import NAME, matches

from ..fleet.authority import COORDINATOR

WRITES, READS = ("up", "chunk"), ("down", "job")


def allowed(fleet: str, user: str, topic: str, access: Literal["read", "write"]) -> bool:
    """May `user` publish on `topic`, or subscribe to it (a pattern with wildcards included)?"""
    if user == COORDINATOR:
        return matches(f"rf/{fleet}/#", topic)
    if not NAME.match(user):
        return False
    own = WRITES if access == "write" else READS
    if topic in {f"rf/{fleet}/dev/{user}/{kind}" for kind in own}:
        return True
    return access == "read" and matches(f"rf/{fleet}/blob/+", topic) and not set("+#") & set(topic)


def mosquitto_rules(fleet: str) -> str:
    """For `acl_file`."""
    lines = [f"user {COORDINATOR}", f"topic readwrite rf/{fleet}/#", ""]
    lines += [f"pattern write rf/{fleet}/dev/%u/{kind}" for kind in WRITES]
    lines += [f"pattern read rf/{fleet}/dev/%u/{kind}" for kind in READS]
    return "\n".join([*lines, f"pattern read rf/{fleet}/blob/+", ""])


class Files:
    """What a broker needs for TLS: the authority, its own certificate and key, the revoked ones."""

    def __init__(self, ca: Path, cert: Path, key: Path, crl: Path) -> None:
        self.ca, self.cert, self.key, self.crl = ca, cert, key, crl


def mosquitto_config(port: int, host: str, files: Files | None = None, acl: Path | None = None) -> str:
    """For `mosquitto -c`; without `files` an open listener, which belongs on loopback."""
    lines = [
        "per_listener_settings false",
        f"listener {port} {host}".rstrip(),
        "persistence false",
        "max_queued_messages 10000",
    ]
    lines += ["log_type error"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        lines += ["user root"]  # else it would give up the right to read our keys before it reads them
    if files is None:
        return "\n".join([*lines, "allow_anonymous true", ""])
    lines += [f"cafile {files.ca}", f"certfile {files.cert}", f"keyfile {files.key}", f"crlfile {files.crl}"]
    lines += [
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
        "tls_version tlsv1.2",
    ]
    return "\n".join([*lines, f"acl_file {acl}", ""])


def emqx_config(port: int, files: Files, rules: Path) -> str:
    """For EMQX 5's `emqx.conf`: client certificates only, the common name as user, our rules and nothing
    else."""
    return f"""\
listeners.tcp.default.enable = false
listeners.ws.default.enable = false
listeners.ssl.default {{
  bind = "0.0.0.0:{port}"
  ssl_options {{
    cacertfile = "{files.ca}"
    certfile = "{files.cert}"
    keyfile = "{files.key}"
    verify = verify_peer
    fail_if_no_peer_cert = true
    versions = ["tlsv1.3", "tlsv1.2"]
  }}
}}
mqtt.peer_cert_as_username = cn
authorization {{
  no_match = deny
  deny_action = disconnect
  sources = [{{ type = file, enable = true, path = "{rules}" }}]
}}
"""


def emqx_rules(fleet: str) -> str:
    """For EMQX's `acl.conf`."""
    own = [f'"rf/{fleet}/dev/${{username}}/{kind}"' for kind in WRITES]
    heard = [f'"rf/{fleet}/dev/${{username}}/{kind}"' for kind in READS]
    return "\n".join(
        [
            f'{{allow, {{username, {{re, "^{COORDINATOR}$"}}}}, all, ["rf/{fleet}/#"]}}.',
            f"{{allow, all, publish, [{', '.join(own)}]}}.",
            f'{{deny, all, subscribe, [{{eq, "rf/{fleet}/blob/+"}}, {{eq, "rf/{fleet}/blob/#"}}]}}.',
            f'{{allow, all, subscribe, [{", ".join(heard)}, "rf/{fleet}/blob/+"]}}.',
            "{deny, all}.",
            "",
        ]
    )
