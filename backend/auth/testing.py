"""An issuer for tests: signs tokens like Better Auth's, and tokens with any other header, payload or key."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import httpx
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from .encoding import encode_base64url
from .jwk import SIGNATURES
from .key_source import KeySource, StaticKeys
from .principal import Principal
from .verifier import TokenVerifier

ALGORITHMS: Final = tuple(SIGNATURES)


@dataclass(frozen=True)
class SigningKey:
    """A private key with its kid and algorithm."""

    kid: str
    alg: str
    private: Any = field(repr=False)

    @classmethod
    def generate(cls, alg: str, kid: str) -> "SigningKey":
        """Make a key for `EdDSA`, `ES256`, `ES512`, `PS256` or `RS256`."""
        if alg not in ALGORITHMS:
            raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}")
        if alg == "EdDSA":
            return cls(kid, alg, ed25519.Ed25519PrivateKey.generate())
        if alg in {"ES256", "ES512"}:
            return cls(kid, alg, ec.generate_private_key(ec.SECP256R1() if alg == "ES256" else ec.SECP521R1()))
        return cls(kid, alg, rsa.generate_private_key(65537, 2048))

    @property
    def jwk(self) -> dict[str, Any]:
        """The public JWK with the members that Better Auth publishes."""
        members = SIGNATURES[self.alg].to_jwk(self.private.public_key(), as_dict=True)
        members.pop("key_ops", None)
        return {"alg": self.alg, **members, "kid": self.kid}

    def sign(self, message: bytes) -> bytes:
        return SIGNATURES[self.alg].sign(message, self.private)


class LocalIssuer:
    """Signs tokens and publishes keys like a Better Auth server.

    `url` is the server's origin and the issuer of `/token` JWTs; the issuer of OAuth access tokens is `url` plus
    `/api/auth`. `audience` is the audience of all tokens, by default `url`. `clock` returns seconds since 1970.
    """

    def __init__(
        self,
        url: str = "http://localhost:3000",
        *,
        audience: str | None = None,
        alg: str = "EdDSA",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.url: Final = url
        self.issuers: Final = (url, f"{url}/api/auth")
        self.audience: Final = audience or url
        self.jwks_url: Final = f"{url}/api/auth/jwks"
        self.clock = clock
        self.keys: list[SigningKey] = []  # all published keys, the current one last
        self._made = 0
        self.rotate(alg)

    @property
    def key(self) -> SigningKey:
        """The key that signs new tokens."""
        return self.keys[-1]

    @property
    def jwks(self) -> dict[str, Any]:
        """The published JWK set."""
        return {"keys": [key.jwk for key in self.keys]}

    def rotate(self, alg: str | None = None, *, kid: str | None = None, keep: bool = True) -> SigningKey:
        """Create a new signing key. Without `keep`, the old keys are removed from the set."""
        self._made += 1
        new = SigningKey.generate(alg or self.key.alg, kid or f"key{self._made:029d}")
        self.keys = [*(self.keys if keep else ()), new]
        return new

    def token(
        self,
        sub: str = "user1",
        *,
        expires_in: float = 900,
        header: Mapping[str, Any] | None = None,
        key: SigningKey | None = None,
        omit: Collection[str] = (),
        **claims: Any,
    ) -> str:
        """Sign a `/token` JWT with Better Auth's default payload, changed by `claims`, without the names in `omit`."""
        return self._sign_claims(header or {}, self._payload(sub, expires_in) | claims, omit, key)

    def principal(self, sub: str = "user1", *, expires_in: float = 900, **claims: Any) -> Principal:
        """The principal of such a token, for overrides of `current_principal`."""
        return Principal.from_claims(self._payload(sub, expires_in) | claims, is_access_token=False)

    def api_key_token(
        self, sub: str = "user1", *, scope: str = "", api_key: object = "key1", expires_in: float = 900, **claims: Any
    ) -> str:
        """Sign a `/token` JWT like the reference configuration for an API key, whose id is the claim `key`."""
        payload = self._payload(sub, expires_in) | {"key": api_key, "scope": scope} | claims
        return self._sign_claims({}, payload, (), None)

    def access_token(
        self,
        sub: str = "user1",
        *,
        scope: str = "",
        client_id: str = "client1",
        expires_in: float = 3600,
        header: Mapping[str, Any] | None = None,
        key: SigningKey | None = None,
        omit: Collection[str] = (),
        **claims: Any,
    ) -> str:
        """Sign an OAuth access token (`at+jwt`) like the oauth-provider plugin's: with scopes, without a profile."""
        now = int(self.clock())
        payload = {
            "iat": now,
            "exp": now + expires_in,
            "iss": self.issuers[1],
            "aud": [self.audience, f"{self.issuers[1]}/oauth2/userinfo"],
            "sub": sub,
            "client_id": client_id,
            "azp": client_id,
            "scope": scope,
            "sid": "session1",
            "jti": encode_base64url(f"{sub}{now}".encode()),
        }
        return self._sign_claims({"typ": "at+jwt", **(header or {})}, payload | claims, omit, key)

    def security_event(
        self,
        sub: str = "user1",
        /,
        *events: str | Mapping[str, Any],
        toe: float | None = None,
        audience: str | None = None,
        header: Mapping[str, Any] | None = None,
        key: SigningKey | None = None,
        omit: Collection[str] = (),
        **claims: Any,
    ) -> str:
        """Sign a security event token (RFC 8417) about `sub`. `toe` is the time of the event, by default now.

        An event is a URI, or a mapping from URIs to their members. `audience` is by default the issuer's audience
        plus `/api/v1/security-events`.
        """
        now = self.clock()
        named = [{event: {}} if isinstance(event, str) else event for event in events]
        payload = {
            "iss": self.url,
            "aud": audience or f"{self.audience}/api/v1/security-events",
            "iat": int(now),
            "jti": uuid4().hex,
            "toe": now if toe is None else toe,
            "sub_id": {"format": "iss_sub", "iss": self.url, "sub": sub},
            "events": {uri: members for event in named for uri, members in event.items()},
        }
        return self._sign_claims({"typ": "secevent+jwt", **(header or {})}, payload | claims, omit, key)

    def sign(
        self, header: Mapping[str, Any] | bytes, payload: Mapping[str, Any] | bytes, *, key: SigningKey | None = None
    ) -> str:
        """Sign any header and payload with `key` (default: the current key). Bytes are signed as they are."""
        parts = (
            part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
            for part in (header, payload)
        )
        signing_input = ".".join(map(encode_base64url, parts))
        return f"{signing_input}.{encode_base64url((key or self.key).sign(signing_input.encode()))}"

    def _sign_claims(
        self, header: Mapping[str, Any], claims: Mapping[str, Any], omit: Collection[str], key: SigningKey | None
    ) -> str:
        key = key or self.key
        kept = {name: value for name, value in claims.items() if name not in omit}
        return self.sign({"alg": key.alg, "kid": key.kid, **header}, kept, key=key)

    def verifier(self, keys: KeySource | None = None, **options: Any) -> TokenVerifier:
        """Return a verifier for this issuer's tokens, by default with its current keys."""
        settings: dict[str, Any] = {"issuers": self.issuers, "audiences": [self.audience], "clock": self.clock}
        return TokenVerifier(keys=keys or StaticKeys(self.jwks), **(settings | options))

    def transport(self) -> httpx.MockTransport:
        """Return a transport for `httpx.AsyncClient` that serves the current key set at `jwks_url`."""

        def respond(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, json=self.jwks) if request.url == self.jwks_url else httpx.Response(404)

        return httpx.MockTransport(respond)

    def _payload(self, sub: str, expires_in: float) -> dict[str, Any]:
        now = int(self.clock())
        day = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "iat": now,
            "name": "Ada Lovelace",
            "email": f"{sub}@example.com",
            "emailVerified": False,
            "image": None,
            "createdAt": day,
            "updatedAt": day,
            "id": sub,
            "sub": sub,
            "exp": now + expires_in,
            "iss": self.url,
            "aud": self.audience,
        }
