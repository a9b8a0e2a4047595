"""Examines a token with the API's verifier and explains each rejection with its remedy."""

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Final

from backend.auth import Principal, Reason
from backend.auth.jwk import CANONICAL
from backend.auth.principal import parse_role
from backend.doctor.addresses import client_id_listed, is_client_id
from backend.doctor.exchange import exchange
from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.doctor.issuer import LEEWAY, Issuer
from backend.doctor.rejections import audiences_in, decode_part, find_rejections
from backend.settings import Settings

LONGEST_LIFETIME: Final = 86400  # seconds, of TOKEN_MAX_LIFETIME

# The verifier's checks in their order.
STEPS: Final[Mapping[str, frozenset[Reason]]] = {
    "form": frozenset({Reason.TOO_LONG, Reason.MALFORMED, Reason.OPAQUE_SESSION, Reason.BAD_HEADER}),
    "algorithm": frozenset({Reason.BAD_ALGORITHM}),
    "kid": frozenset({Reason.BAD_KEY_ID}),
    "typ": frozenset({Reason.BAD_TYPE}),
    "times": frozenset({Reason.BAD_TIMES, Reason.EXPIRED, Reason.NOT_YET_VALID}),
    "lifetime": frozenset({Reason.LIVES_TOO_LONG}),
    "issuer": frozenset({Reason.BAD_ISSUER}),
    "audience": frozenset({Reason.BAD_AUDIENCE}),
    "subject": frozenset({Reason.BAD_SUBJECT, Reason.SENDER_CONSTRAINED, Reason.INCOMPLETE}),
    "key": frozenset({Reason.UNKNOWN_KEY}),
    "signature": frozenset({Reason.BAD_SIGNATURE}),
}

_KINDS: Final = {
    "logout+jwt": "a back-channel logout token",
    "better-auth.session-cache+jwt": "Better Auth's cookie cache",
    "secevent+jwt": "a security event",
    "dpop+jwt": "a DPoP proof",
}


class TokenExamination:
    """Reports every reason to reject a token, not only the first.

    `principal` is set by `findings` if the token is valid apart from the reported reasons.
    """

    def __init__(self, token: str, settings: Settings, issuer: Issuer, *, clock: Callable[[], float]) -> None:
        self._token = token
        self._settings = settings
        self._issuer = issuer
        self._clock = clock
        self._header = decode_part(token, 0)
        self._claims = decode_part(token, 1)
        self._exchangeable = True
        self.principal: Principal | None = None

    async def findings(self) -> AsyncIterator[Finding]:
        rejections = await find_rejections(self._token, self._settings, self._issuer.keys, self._clock)
        refused, self.principal = rejections.reasons, rejections.principal
        for step, reasons in STEPS.items():
            found = [reason for reason in refused if reason in reasons]
            for reason in found:
                yield fail(step, self._explain(reason))
            if refused and refused[-1] in reasons and self.principal is None and not rejections.keys_missing:
                break
            if step == "key" and rejections.keys_missing:
                yield fail(step, "cannot be checked without the issuer's keys: see above")
                break
            if not found:
                yield ok(step, self._describe(step))
        if refused == [Reason.OPAQUE_SESSION] and self._exchangeable:
            async for finding in self._exchange():
                yield finding
        if self.principal is not None:
            for finding in self._examine_principal(self.principal):
                yield finding

    def _explain(self, reason: Reason) -> str:
        header, claims, settings = self._header, self._claims, self._settings
        get_another = f"send a JWT from Better Auth's {self._issuer.base_url}/token"
        now = self._clock()
        match reason:
            case Reason.TOO_LONG:
                return f"{reason} By default the payload is the whole user row with its image: set `definePayload`"
            case Reason.OPAQUE_SESSION:
                return (
                    f"this is a session token, not a JWT: exchange it at {self._issuer.base_url}/token "
                    "(as the bearer token), and send the JWT in the response"
                )
            case Reason.MALFORMED:
                return f'this is not a JWT: {get_another} (its "token"), without quotes, `Bearer` or line breaks'
            case Reason.BAD_HEADER:
                return f"{reason} The jwt plugin does not issue such tokens: {get_another}"
            case Reason.BAD_ALGORITHM:
                return (
                    f"alg is {shown(header.get('alg'))}: set the jwt plugin's `jwks.keyPairConfig` to one of "
                    f"{', '.join(CANONICAL)}; if it is, another program issued the token: {get_another}"
                )
            case Reason.BAD_KEY_ID:
                return f"the header has no usable kid, so the jwt plugin did not issue the token: {get_another}"
            case Reason.BAD_TYPE:
                kind = _KINDS.get(str(header.get("typ")).lower(), "not an access token")
                return f"typ is {shown(header.get('typ'))}, {kind}: {get_another}"
            case Reason.BAD_TIMES:
                return (
                    f"exp is {shown(claims.get('exp'))}, iat is {shown(claims.get('iat'))}; both must be numbers "
                    f"(`signJWT` adds no iat): {get_another}"
                )
            case Reason.EXPIRED if claims["exp"] < claims["iat"]:
                return 'exp is before iat: the jwt plugin reads a number in `expirationTime` as a date; write "15m"'
            case Reason.EXPIRED:
                behind = " (this machine's clock is ahead: see clock)" if self._issuer.ahead < -LEEWAY else ""
                return f"it expired {now - claims['exp']:.0f} s ago{behind}: {get_another}"
            case Reason.NOT_YET_VALID:
                start = max(claims["iat"], claims.get("nbf", claims["iat"]))
                return f"it becomes valid in {start - now:.0f} s: synchronise both machines' clocks by NTP"
            case Reason.LIVES_TOO_LONG:
                life = math.ceil(claims["exp"] - claims["iat"])
                setting = f", or set TOKEN_MAX_LIFETIME to {life}" if life <= LONGEST_LIFETIME else ""
                return (
                    f"its lifetime is {life} s, the maximum is {settings.token_max_lifetime} s: "
                    f"shorten the jwt plugin's `expirationTime`{setting}"
                )
            case Reason.BAD_ISSUER:
                return self._explain_issuer(claims.get("iss"))
            case Reason.BAD_AUDIENCE:
                return self._explain_audience()
            case Reason.BAD_SUBJECT:
                return f"sub is {shown(claims.get('sub'))}: let the jwt plugin's `getSubject` return the user's id"
            case Reason.SENDER_CONSTRAINED:
                return "it is bound to a client's key (DPoP, `cnf`), which is not supported: request an unbound token"
            case Reason.INCOMPLETE:
                return "an access token (at+jwt) needs client_id and jti: the oauth-provider plugin did not issue it"
            case Reason.UNKNOWN_KEY:
                return self._explain_unknown_key(header["kid"], get_another)
            case Reason.BAD_SIGNATURE:
                key = self._issuer.keys and self._issuer.keys.keys.get(header["kid"])
                if key and CANONICAL[header["alg"]] != key.algorithm:
                    return f"alg is {header['alg']}, but the published key has {key.algorithm}: {get_another}"
                return (
                    f"kid {shown(header['kid'])} is published, but another key signed the token: it is older than "
                    f"Better Auth's database, or {self._issuer.setting} names another server: {get_another}"
                )
        return str(reason)

    def _explain_unknown_key(self, kid: str, get_another: str) -> str:
        keys = self._issuer.keys
        assert keys is not None  # the reason implies a lookup in them
        for skipped in keys.skipped:
            if skipped.kid == kid:
                return f"kid {shown(kid)} is published, but cannot be used: {skipped.reason}: see keys"
        return (
            f"kid {shown(kid)} is not published at {self._settings.jwks_url}, only {listed(keys.keys)}: the token is "
            f"older than these keys: {get_another}; or from another Better Auth: correct {self._issuer.setting}"
        )

    def _explain_issuer(self, issuer: object) -> str:
        accepted = self._settings.issuers
        mismatch = f"iss is {shown(issuer)}, accepted: {listed(accepted)}"
        if not isinstance(issuer, str) or not issuer:
            return f"{mismatch}: the jwt plugin did not issue the token"
        if issuer.rstrip("/").casefold() in {name.rstrip("/").casefold() for name in accepted}:
            return f"{mismatch}: case and a trailing slash matter: set BETTER_AUTH_ISSUERS to exactly the token's iss"
        return (
            f"{mismatch}: if it is this Better Auth's `baseURL`, set BETTER_AUTH_URL to it, and "
            f"BETTER_AUTH_JWKS_URL to {self._settings.jwks_url}; or add it to BETTER_AUTH_ISSUERS"
        )

    def _explain_audience(self) -> str:
        settings, named = self._settings, audiences_in(self._claims)
        mismatch = f"aud is {shown(self._claims.get('aud'))}, accepted: {listed(settings.audiences)}"
        resource = settings.public_url
        if any(is_client_id(name) for name in named):
            return f"{mismatch}: this is an ID token: send the access token, requested with resource={resource}"
        if not named:
            return f'{mismatch}: name this API in the jwt plugin: `audience: "{resource}"`'
        return (
            f"{mismatch}: add it to BETTER_AUTH_AUDIENCES if such tokens are meant for this API; "
            f'otherwise set `audience: "{resource}"` (this PUBLIC_URL) in the jwt plugin'
        )

    def _describe(self, step: str) -> str:
        header, claims = self._header, self._claims
        match step:
            case "form":
                return "a JWT"
            case "algorithm":
                return str(header["alg"])
            case "kid":
                return shown(header["kid"])
            case "typ":
                return shown(header.get("typ", "none, as usual for the jwt plugin"))
            case "times":
                return f"valid for another {claims['exp'] - self._clock():.0f} s"
            case "lifetime":
                return f"{claims['exp'] - claims['iat']:.0f} s, the maximum is {self._settings.token_max_lifetime} s"
            case "issuer":
                return shown(claims["iss"])
            case "audience":
                return listed(audiences_in(claims))
            case "subject":
                return shown(claims["sub"])
            case "key":
                return "published"
        return "valid"

    async def _exchange(self) -> AsyncIterator[Finding]:
        """Exchange the session token for a JWT and examine that."""
        jwt, finding = await exchange(self._token, self._issuer.base_url, self._settings.public_url)
        yield finding
        if jwt:
            examination = TokenExamination(jwt, self._settings, self._issuer, clock=self._clock)
            examination._exchangeable = False
            async for finding in examination.findings():
                yield finding
            self.principal = examination.principal

    def _examine_principal(self, principal: Principal) -> Iterator[Finding]:
        """Which routes will reject this principal although the token is valid."""
        named = self._claims.get("client_id") or self._claims.get("azp")
        if named in self._settings.audiences:
            yield client_id_listed(str(named))
        if principal.is_machine:
            yield warn("person", "this is an OAuth client without a user (client_credentials): user routes return 403")
        if principal.is_banned(self._clock()):
            yield warn("person", "Better Auth has banned this account: all routes return 403 until the ban is lifted")
        if principal.scopes is not None:
            yield ok("scopes", f"{listed(sorted(principal.scopes))}; other routes return 403 insufficient_scope")
        elif parse_role(principal.claims.get("role")) is None:
            yield warn(
                "roles",
                f"`role` is {shown(self._claims['role'])}, which counts as no role: let `definePayload` return "
                "a string with commas or an array of strings",
            )
        elif principal.roles is None:
            yield warn(
                "roles",
                "the token has no `role`, so the administrators' routes are closed: "
                "add the admin plugin, and `role` to `definePayload` if that is set",
            )
        else:
            yield ok("roles", listed(principal.roles))
