"""An issuer for tests: keys and tokens like Better Auth's, and any that it would never make."""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

import httpx
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from .encoding import encode_base64url
from .keys import KeySource, StaticKeys
from .verifier import TokenVerifier

ALGORITHMS: Final = ("EdDSA", "ES256", "ES512", "PS256", "RS256")


@dataclass(frozen=True)
class SigningKey:
    """A private key as Better Auth keeps it. `jwk` is its public half as published."""

    kid: str
    alg: str
    private: Any = field(repr=False)

    @classmethod
    def generate(cls, alg: str, kid: str) -> "SigningKey":
        """Make a key for `EdDSA`, `ES256`, `ES512`, `PS256` or `RS256`."""
        match alg:
            case "EdDSA":
                return cls(kid, alg, ed25519.Ed25519PrivateKey.generate())
            case "ES256":
                return cls(kid, alg, ec.generate_private_key(ec.SECP256R1()))
            case "ES512":
                return cls(kid, alg, ec.generate_private_key(ec.SECP521R1()))
            case "PS256" | "RS256":
                return cls(kid, alg, rsa.generate_private_key(65537, 2048))
        raise ValueError(f"alg must be one of {', '.join(ALGORITHMS)}")

    @property
    def jwk(self) -> dict[str, Any]:
        """The public JWK, with the members that Better Auth gives it."""
        public = self.private.public_key()
        match self.alg:
            case "EdDSA":
                members = OKPAlgorithm.to_jwk(public, as_dict=True)
            case "ES256" | "ES512":
                members = ECAlgorithm.to_jwk(public, as_dict=True)
            case _:
                members = RSAAlgorithm.to_jwk(public, as_dict=True)
                del members["key_ops"]
        return {"alg": self.alg, **members, "kid": self.kid}

    def sign(self, message: bytes) -> bytes:
        """Sign with the key's own algorithm."""
        match self.alg:
            case "EdDSA":
                return OKPAlgorithm().sign(message, self.private)
            case "ES256":
                return ECAlgorithm(ECAlgorithm.SHA256).sign(message, self.private)
            case "ES512":
                return ECAlgorithm(ECAlgorithm.SHA512).sign(message, self.private)
            case "PS256":
                return RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256).sign(message, self.private)
        return RSAAlgorithm(RSAAlgorithm.SHA256).sign(message, self.private)


class LocalIssuer:
    """A Better Auth server reduced to its keys and its signature.

    `url` is the server's origin: the issuer of its `/token` JWTs. OAuth access tokens come from `url` plus `/api/auth`,
    as the real server's do. `audience` is what tokens are for, by default the origin. `clock` gives seconds since 1970.
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
        self.keys: list[SigningKey] = []
        """All published keys, the current one last."""
        self._made = 0
        self.rotate(alg)

    @property
    def key(self) -> SigningKey:
        """The key that signs now."""
        return self.keys[-1]

    @property
    def jwks(self) -> dict[str, Any]:
        """The set as `/jwks` gives it."""
        return {"keys": [key.jwk for key in self.keys]}

    def rotate(self, alg: str | None = None, *, kid: str | None = None, keep: bool = True) -> SigningKey:
        """Sign with a new key from now on. Without `keep` the old ones are gone from the set."""
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
        """A `/token` JWT with Better Auth's default payload; `claims` go over it, `omit` are left out of it."""
        payload = self._payload(sub, expires_in) | claims
        key = key or self.key
        kept = {name: value for name, value in payload.items() if name not in omit}
        return self.sign({"alg": key.alg, "kid": key.kid} | dict(header or {}), kept, key=key)

    def api_key_token(
        self, sub: str = "user1", *, scope: str = "", api_key: object = "key1", expires_in: float = 900, **claims: Any
    ) -> str:
        """A `/token` JWT as the reference configuration makes it for an API key, whose id is the claim `key`."""
        payload = self._payload(sub, expires_in) | {"key": api_key, "scope": scope} | claims
        return self.sign({"alg": self.key.alg, "kid": self.key.kid}, payload)

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
        """An OAuth access token (`at+jwt`) as the oauth-provider plugin makes them: no profile, but scopes."""
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
        } | claims
        key = key or self.key
        kept = {name: value for name, value in payload.items() if name not in omit}
        return self.sign({"alg": key.alg, "typ": "at+jwt", "kid": key.kid} | dict(header or {}), kept, key=key)

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
        """A security event token (RFC 8417) of what happened to `sub` at `toe`, by default now.

        An event is its URI, or a mapping of it to its members. `audience` is by default the tokens' audience and
        `/api/v1/security-events`.
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
        } | claims
        key = key or self.key
        kept = {name: value for name, value in payload.items() if name not in omit}
        return self.sign({"alg": key.alg, "typ": "secevent+jwt", "kid": key.kid} | dict(header or {}), kept, key=key)

    def sign(
        self, header: Mapping[str, Any] | bytes, payload: Mapping[str, Any] | bytes, *, key: SigningKey | None = None
    ) -> str:
        """Sign any header and payload as they are, bytes untouched, with `key` (default: the current one)."""
        signing_input = ".".join(encode_base64url(_serialized(part)) for part in (header, payload))
        return f"{signing_input}.{encode_base64url((key or self.key).sign(signing_input.encode()))}"

    def verifier(self, keys: KeySource | None = None, **options: Any) -> TokenVerifier:
        """A verifier that trusts this issuer, by default with the keys it has now."""
        settings: dict[str, Any] = {"issuers": self.issuers, "audiences": [self.audience], "clock": self.clock}
        return TokenVerifier(keys=keys or StaticKeys(self.jwks), **(settings | options))

    def transport(self) -> httpx.MockTransport:
        """For `httpx.AsyncClient(transport=...)`: answers the key set's URL with the set of that moment."""

        def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, json=self.jwks) if request.url == self.jwks_url else httpx.Response(404)

        return httpx.MockTransport(answer)

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


def _serialized(part: Mapping[str, Any] | bytes) -> bytes:
    return part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
