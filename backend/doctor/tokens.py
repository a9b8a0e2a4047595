"""What the verifier says of a token, and which setting would have it say something else."""

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final

import httpx

from backend.auth import (
    InvalidToken,
    Key,
    KeySet,
    KeysUnavailable,
    Principal,
    Reason,
    TokenVerifier,
    decode_object,
)
from backend.auth.claims import parse_role
from backend.auth.encoding import decode_base64url
from backend.auth.fetch import TOTAL_TIMEOUT, check_url, new_client
from backend.auth.jwk import CANONICAL
from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.doctor.issuer import LEEWAY, Issuer
from backend.settings import Settings

LONGEST_LIFETIME: Final = 86400  # seconds, of TOKEN_MAX_LIFETIME

# What the verifier looks at, in its order.
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


class _Keys:
    """The set that was fetched a moment ago."""

    def __init__(self, keys: KeySet | None) -> None:
        self._keys = keys

    def current(self, kid: str) -> Key | None:
        return self._keys.keys.get(kid) if self._keys else None

    async def get(self, kid: str) -> Key:
        if self._keys is None:
            raise KeysUnavailable("there are none")
        if key := self.current(kid):
            return key
        raise InvalidToken(Reason.UNKNOWN_KEY)

    async def replacement(self, _: Key, /) -> Key | None:
        return None


class TokenExamination:
    """Judges a token by the API's own verifier, once more after each mismatch as if that were mended.

    `principal` is whose it is, once everything but what was named has proved good.
    """

    def __init__(self, token: str, settings: Settings, issuer: Issuer, *, clock: Callable[[], float]) -> None:
        self._token = token
        self._settings = settings
        self._issuer = issuer
        self._clock = clock
        self._header = _part(token, 0)
        self._claims = _part(token, 1)
        self._exchangeable = True
        self.principal: Principal | None = None

    async def findings(self) -> AsyncIterator[Finding]:
        refused, unjudged = await self._judge()
        for step, reasons in STEPS.items():
            found = [reason for reason in refused if reason in reasons]
            for reason in found:
                yield fail(step, self._explain(reason))
            if refused and refused[-1] in reasons and self.principal is None and not unjudged:
                break
            if step == "key" and unjudged:
                yield fail(step, "cannot be looked up without the issuer's keys: see above")
                break
            if not found:
                yield ok(step, self._describe(step))
        if refused == [Reason.OPAQUE_SESSION] and self._exchangeable:
            async for finding in self._exchange():
                yield finding
        if self.principal is not None:
            for finding in self._look_at(self.principal):
                yield finding

    async def _judge(self) -> tuple[list[Reason], bool]:
        """Every reason to refuse it, and whether there were no keys to judge it by."""
        options: dict[str, Any] = {
            "issuers": self._settings.issuers,
            "audiences": self._settings.audiences,
            "max_lifetime": self._settings.token_max_lifetime,
            "clock": self._clock,
        }
        refused: list[Reason] = []
        while True:
            try:
                self.principal = await TokenVerifier(keys=_Keys(self._issuer.keys), **options).verify(self._token)
            except KeysUnavailable:
                return refused, True
            except InvalidToken as error:
                if error.reason in refused:
                    return refused, False  # its times contradict each other
                refused.append(error.reason)
                mended = self._mended(error.reason, options)
                if mended is None:
                    return refused, False
                options |= mended
            else:
                return refused, False

    def _mended(self, reason: Reason, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """The verifier's options with which this reason would go away; None when none would."""
        claims = self._claims
        match reason:
            case Reason.EXPIRED if claims["exp"] >= claims["iat"]:
                return {"clock": lambda: claims["exp"]}
            case Reason.NOT_YET_VALID:
                return {"clock": lambda: max(claims["iat"], claims.get("nbf", claims["iat"]))}
            case Reason.LIVES_TOO_LONG:
                return {"max_lifetime": math.inf}
            case Reason.BAD_ISSUER if isinstance(claims.get("iss"), str) and claims["iss"]:
                return {"issuers": [*options["issuers"], claims["iss"]]}
            case Reason.BAD_AUDIENCE if named := _audience(claims):
                return {"audiences": [*options["audiences"], named[0]]}
        return None

    def _explain(self, reason: Reason) -> str:
        header, claims, settings = self._header, self._claims, self._settings
        get_another = f"send what Better Auth's {self._issuer.base_url}/token gives"
        now = self._clock()
        match reason:
            case Reason.TOO_LONG:
                return f"{reason} Better Auth's own payload is the whole user row, pictures too: give `definePayload`"
            case Reason.OPAQUE_SESSION:
                return (
                    f"this is a session token, not a JWT: exchange it at {self._issuer.base_url}/token "
                    "(as the bearer), and send what comes back"
                )
            case Reason.MALFORMED:
                return f'this is no JWT: {get_another} as "token", without quotes, `Bearer` or line breaks'
            case Reason.BAD_HEADER:
                return f"{reason} It was not made by the jwt plugin: {get_another}"
            case Reason.BAD_ALGORITHM:
                return (
                    f"alg is {shown(header.get('alg'))}: let the jwt plugin sign with {', '.join(CANONICAL)} (its "
                    f"`jwks.keyPairConfig`); if it does, the token is not its own: {get_another}"
                )
            case Reason.BAD_KEY_ID:
                return f"the header names no usable kid, so the token is not the jwt plugin's: {get_another}"
            case Reason.BAD_TYPE:
                kind = _KINDS.get(str(header.get("typ")).lower(), "no access token")
                return f"typ is {shown(header.get('typ'))}, {kind}: {get_another}"
            case Reason.BAD_TIMES:
                return (
                    f"exp is {shown(claims.get('exp'))}, iat is {shown(claims.get('iat'))}: both must be numbers, and "
                    f"`signJWT` adds no iat: {get_another}"
                )
            case Reason.EXPIRED if claims["exp"] < claims["iat"]:
                return 'exp is before iat: a number as `expirationTime` of the jwt plugin is a date: write "15m"'
            case Reason.EXPIRED:
                behind = " (this machine's clock is ahead: see clock)" if self._issuer.ahead < -LEEWAY else ""
                return f"it expired {now - claims['exp']:.0f} s ago{behind}: {get_another}"
            case Reason.NOT_YET_VALID:
                start = max(claims["iat"], claims.get("nbf", claims["iat"]))
                return f"it is good in {start - now:.0f} s: set this machine's clock by NTP, and Better Auth's"
            case Reason.LIVES_TOO_LONG:
                life = math.ceil(claims["exp"] - claims["iat"])
                setting = f", or set TOKEN_MAX_LIFETIME to {life}" if life <= LONGEST_LIFETIME else ""
                return (
                    f"it lives {life} s, accepted are {settings.token_max_lifetime}: "
                    f"shorten `expirationTime` of the jwt plugin{setting}"
                )
            case Reason.BAD_ISSUER:
                return self._explain_issuer(claims.get("iss"))
            case Reason.BAD_AUDIENCE:
                return self._explain_audience()
            case Reason.BAD_SUBJECT:
                return f"sub is {shown(claims.get('sub'))}: let `getSubject` of the jwt plugin give the user's id"
            case Reason.SENDER_CONSTRAINED:
                return (
                    "it is bound to a key of the client (DPoP, `cnf`), which is not checked here: ask for one without"
                )
            case Reason.INCOMPLETE:
                return "an access token (at+jwt) needs client_id and jti: it was not made by the oauth-provider plugin"
            case Reason.UNKNOWN_KEY:
                return self._explain_unknown_key(header["kid"], get_another)
            case Reason.BAD_SIGNATURE:
                key = self._issuer.keys and self._issuer.keys.keys.get(header["kid"])
                if key and CANONICAL[header["alg"]] != key.algorithm:
                    return f"alg is {header['alg']}, that of the published key {key.algorithm}: {get_another}"
                return (
                    f"kid {shown(header['kid'])} is published, but another key signed this: the token is older than "
                    f"Better Auth's database, or {self._issuer.setting} leads to another server: {get_another}"
                )
        return str(reason)

    def _explain_unknown_key(self, kid: str, get_another: str) -> str:
        keys = self._issuer.keys
        assert keys is not None  # it was looked up in them
        for skipped in keys.skipped:
            if skipped.kid == kid:
                return f"kid {shown(kid)} is published, but cannot be used: {skipped.reason}: see keys"
        return (
            f"kid {shown(kid)} is not published at {self._settings.jwks_url}, but {listed(keys.keys)}: the token is "
            f"older than these, or of another Better Auth: {get_another}; if it was, mend {self._issuer.setting}"
        )

    def _explain_issuer(self, issuer: object) -> str:
        accepted = self._settings.issuers
        said = f"iss is {shown(issuer)}, accepted are {listed(accepted)}"
        if not isinstance(issuer, str) or not issuer:
            return f"{said}: the token is not the jwt plugin's"
        near = {name.rstrip("/").casefold() for name in accepted}
        if issuer.rstrip("/").casefold() in near:
            return f"{said}: case and a slash at the end count: set BETTER_AUTH_ISSUERS to it, letter by letter"
        return (
            f"{said}: if that is a name of this Better Auth (its `baseURL`), set BETTER_AUTH_URL to it, and "
            f"BETTER_AUTH_JWKS_URL to {self._settings.jwks_url}; or add it to BETTER_AUTH_ISSUERS"
        )

    def _explain_audience(self) -> str:
        settings, named = self._settings, _audience(self._claims)
        said = f"aud is {shown(self._claims.get('aud'))}, accepted are {listed(settings.audiences)}"
        resource = settings.public_url
        if any(is_client_id(name) for name in named):
            return f"{said}: an ID token, for a client: send the access token, asked for with resource={resource}"
        if not named:
            return f'{said}: let the jwt plugin name this API: `audience: "{resource}"`'
        return (
            f"{said}: add it to BETTER_AUTH_AUDIENCES if such tokens are meant for this API; "
            f'else let the jwt plugin say `audience: "{resource}"`, as PUBLIC_URL does'
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
                return shown(header.get("typ", "none, as the jwt plugin has it"))
            case "times":
                return f"good for {claims['exp'] - self._clock():.0f} s more"
            case "lifetime":
                return f"{claims['exp'] - claims['iat']:.0f} s of {self._settings.token_max_lifetime}"
            case "issuer":
                return shown(claims["iss"])
            case "audience":
                return listed(_audience(claims))
            case "subject":
                return shown(claims["sub"])
            case "key":
                return "published"
        return "good"

    async def _exchange(self) -> AsyncIterator[Finding]:
        """Have Better Auth make the JWT of a session token, and judge that."""
        url = f"{self._issuer.base_url}/token"
        try:
            check_url(url)
        except ValueError:
            yield warn("exchange", f"a session token is not sent over {url}: neither https nor a loopback address")
            return
        try:
            async with new_client() as client:
                answer = await client.get(
                    url,
                    headers={"Authorization": f"Bearer {self._token}"},
                    follow_redirects=False,
                    timeout=TOTAL_TIMEOUT,
                )
            jwt = str(answer.json()["token"]) if answer.is_success else ""
        except httpx.HTTPError as error:
            yield fail("exchange", f"{url} cannot be asked ({type(error).__name__}): see above")
        except (ValueError, KeyError, TypeError):
            yield fail("exchange", f"{url} answers with no token: set BETTER_AUTH_URL to Better Auth's `baseURL`")
        else:
            if not answer.is_success:
                yield fail(
                    "exchange",
                    f"HTTP {answer.status_code} at {url}: {_why_no_token(answer, self._settings.public_url)}",
                )
                return
            yield ok("exchange", "Better Auth made a JWT of it, which is judged from here on")
            judged = TokenExamination(jwt, self._settings, self._issuer, clock=self._clock)
            judged._exchangeable = False
            async for finding in judged.findings():
                yield finding
            self.principal = judged.principal

    def _look_at(self, principal: Principal) -> Iterator[Finding]:
        """What routes will say of somebody whose token is good."""
        named = self._claims.get("client_id") or self._claims.get("azp")
        if named in self._settings.audiences:
            yield client_id_listed(str(named))
        if principal.is_machine:
            yield warn(
                "person", "it speaks for an OAuth client and no person (client_credentials): routes for people are 403"
            )
        if principal.is_banned(self._clock()):
            yield warn("person", "Better Auth has banned this account: every route is 403 until it is unbanned there")
        if principal.scopes is not None:
            yield ok("scopes", f"{listed(sorted(principal.scopes))}: routes for others are 403 insufficient_scope")
        elif parse_role(principal.claims.get("role")) is None:
            yield warn(
                "roles",
                f"`role` is {shown(self._claims['role'])}, and counts as no role at all: let `definePayload` give "
                "a string with commas or an array of strings",
            )
        elif principal.roles is None:
            yield warn(
                "roles",
                "there is no `role`, so no administrator's route is open to anybody: "
                "add the admin plugin, and `role` to `definePayload` if there is one",
            )
        else:
            yield ok("roles", listed(principal.roles))


def is_client_id(name: str) -> bool:
    """Whether an audience looks like an OAuth client of Better Auth: 32 letters, and no address."""
    return len(name) == 32 and name.isascii() and name.isalnum()


def client_id_listed(name: str) -> Finding:
    return warn(
        "audiences",
        f"{shown(name)} is an OAuth client, so that its ID tokens pass for access tokens: "
        "take it out of BETTER_AUTH_AUDIENCES",
    )


def _why_no_token(answer: httpx.Response, resource: str) -> str:
    if answer.is_server_error and not answer.content:
        return (
            "Better Auth cannot read its own key, as after a change of BETTER_AUTH_SECRET: "
            "set the old secret there again, or delete the rows of its table jwks"
        )
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        return (
            "the session has ended, the account is banned, or Better Auth lacks the bearer plugin, whose "
            "`requireSignature` wants what the header set-auth-token gave; or it is an opaque access token: "
            f"ask for one with resource={resource}"
        )
    if answer.status_code == httpx.codes.NOT_FOUND:
        return "give Better Auth the jwt plugin"
    return "Better Auth's own log says what ails it"


def _audience(claims: Mapping[str, Any]) -> list[str]:
    found = claims.get("aud")
    return [name for name in (found if isinstance(found, list) else [found]) if isinstance(name, str) and name]


def _part(token: str, index: int) -> dict[str, Any]:
    """The header or the claims, unverified; nothing when they cannot be read."""
    try:
        return decode_object(decode_base64url(token.split(".")[index]))
    except (ValueError, IndexError):
        return {}
