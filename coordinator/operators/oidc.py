"""Operators who log in elsewhere: a token of an OpenID Connect issuer says who somebody is and which role
he has.

Such a token lets somebody make requests. It signs no job: devices check keys that an admin named, and know
no issuer.
"""

import json
import urllib.request
from typing import Any

from rankfleet.federated.errors import ConfigError, Refused
from rankfleet.federated.trust.roster import RANKS

from ..config import Oidc

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]
"""Signatures with a public key alone: a shared secret, or none, is no proof."""
PATIENCE_S = 10


class Issuer:
    """Asks the issuer for its keys, and keeps them for five minutes. Blocking: call it in a thread."""

    def __init__(self, config: Oidc) -> None:
        self.config = config
        self._keys: Any = None

    def role(self, token: str) -> tuple[str, str]:
        """(who, role) of a token. Raises Refused, and ConfigError where the issuer cannot be asked."""
        import jwt

        try:
            key = self._client().get_signing_key_from_jwt(token)
            said: dict[str, Any] = jwt.decode(
                token, key.key, algorithms=ALGORITHMS, audience=self.config.audience,
                issuer=self.config.issuer,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )  # fmt: skip
        except (jwt.PyJWKClientConnectionError, OSError) as error:
            raise ConfigError(
                f"the issuer {self.config.issuer} cannot be asked: {error}", "`oidc.issuer`"
            ) from None
        except jwt.PyJWTError as error:
            raise Refused(f"the token is not taken: {error}", "log in again") from None
        named = said.get(self.config.claim, [])
        roles = {
            str(r).removeprefix("rankfleet-") for r in (named if isinstance(named, list) else [named])
        } & set(RANKS)
        if not roles:
            raise Refused(
                f"the token names no role in its claim `{self.config.claim}`",
                "one of rankfleet-viewer, -operator, -admin",
            )
        return str(said.get("email") or said["sub"])[:64], max(roles, key=RANKS.__getitem__)

    def _client(self) -> Any:
        if self._keys is None:
            import jwt

            where = self.config.issuer.rstrip("/") + "/.well-known/openid-configuration"
            if not where.startswith(("https://", "http://127.0.0.1", "http://localhost")):
                raise ConfigError(f"the issuer {self.config.issuer} is not at https://", "`oidc.issuer`")
            with urllib.request.urlopen(where, timeout=PATIENCE_S) as answer:  # noqa: S310 - the scheme was looked at
                about = json.loads(answer.read(1 << 20))
            self._keys = jwt.PyJWKClient(about["jwks_uri"], cache_keys=True, lifespan=300, timeout=PATIENCE_S)
        return self._keys
