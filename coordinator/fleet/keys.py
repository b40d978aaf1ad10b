"""The coordinator's signing key."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from rankfleet.federated.program.files import write_atomic


class Keys:
    """Made at the first start, kept in the data directory, readable by the owner alone."""

    def __init__(self, home: Path) -> None:
        path = home / "coordinator.key"
        if not path.exists():
            write_atomic(path, Ed25519PrivateKey.generate().private_bytes_raw(), 0o600)
        self._private = Ed25519PrivateKey.from_private_bytes(path.read_bytes())
        self.public: bytes = self._private.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(data)
