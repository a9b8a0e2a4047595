"""Verifies security event tokens (RFC 8417): form, signature, issuer, audience, subject and times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError

from backend.auth import JWS, InvalidToken, KeySource, Reason, decode_object, parse_jws, verify_signature
from backend.auth.principal import read_roles, without_unstorable
from backend.web.event_quotas import EventQuotas

from .schemas import Claims, ClaimsChange, Err, Event, EventType, Merge, SecurityEvent, Subject

# Compared without case. RFC 8417, section 2.3, recommends to omit the prefix `application/`; this API requires that.
TYPE: Final = "secevent+jwt"
MAX_HEADER: Final = 1024  # characters, from an address over its quota: `alg`, `kid` and `typ` take 120
WINDOW: Final = 300.0  # seconds between `iat` and now; a sender that retries later signs a new token
LEEWAY: Final = 5.0  # seconds of clock skew

_ERR = dict.fromkeys((Reason.BAD_ALGORITHM, Reason.BAD_KEY_ID, Reason.UNKNOWN_KEY), Err.invalid_key)
_ERR[Reason.BAD_SIGNATURE] = Err.authentication_failed


class Rejected(Exception):
    """The token is rejected. The message never contains a part of the token."""

    def __init__(self, err: Err, description: str) -> None:
        super().__init__(description)
        self.err = err


@dataclass(kw_only=True, slots=True)
class SecurityEventVerifier:
    """Verifies the security event tokens of one Better Auth server.

    `issuers`: the issuer's names. `audience`: the required audience. `clock`: seconds since 1970.
    """

    keys: KeySource
    issuers: Sequence[str]
    audience: str
    clock: Callable[[], float]

    async def verify(self, token: bytes, quotas: EventQuotas, *, is_over_quota: bool) -> SecurityEvent:
        """Return the content of a token. Raises Rejected, RateLimited or KeysUnavailable.

        Checks the claims before the signature, except if the sender's address has spent its quota of rejected tokens:
        reading 16 KiB of claims takes 30 times as long as verifying a signature.
        """
        try:
            jws = _parse(token, longest_header=MAX_HEADER if is_over_quota else len(token))
            if is_over_quota:
                quotas.check()
                await verify_signature(jws, self.keys)
                return self._read(jws)
            event = self._read(jws)
            await verify_signature(jws, self.keys)
        except InvalidToken as error:
            raise Rejected(_ERR.get(error.reason, Err.invalid_request), error.reason) from None
        return event

    def _read(self, jws: JWS) -> SecurityEvent:
        try:
            claims = Claims.model_validate(without_unstorable(decode_object(jws.payload)))
            self._check_names(claims)
            return SecurityEvent(
                id=claims.jti,
                subject=claims.sub_id.sub,
                at=self._check_times(claims),
                events=tuple(self._read_event(claims, *event) for event in claims.events.items()),
            )
        except ValidationError as error:
            # Only the first part of the location is a name of this schema; the rest may come from the sender.
            name = error.errors(include_input=False, include_context=False)[0]["loc"][0]
            raise Rejected(Err.invalid_request, f"{name} is missing or invalid.") from None
        except ValueError:
            raise InvalidToken(Reason.MALFORMED) from None

    def _check_names(self, claims: Claims) -> None:
        if claims.iss not in self.issuers:
            raise Rejected(Err.invalid_issuer, Reason.BAD_ISSUER)
        if self.audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
            raise Rejected(Err.invalid_audience, Reason.BAD_AUDIENCE)
        self._check_subject(claims.sub_id)

    def _check_subject(self, subject: Subject) -> None:
        if subject.iss not in self.issuers:
            raise Rejected(Err.access_denied, "The subject belongs to another issuer.")

    def _check_times(self, claims: Claims) -> datetime:
        now = self.clock()
        if abs(now - claims.iat) > WINDOW:
            raise Rejected(
                Err.invalid_request, "iat is not within five minutes of now: check the clocks, sign a new token."
            )
        if claims.exp is not None and claims.exp <= now - LEEWAY:
            raise Rejected(Err.invalid_request, Reason.EXPIRED)
        at = claims.iat if claims.toe is None else claims.toe
        if max(at, claims.nbf or 0) > now + LEEWAY:
            raise Rejected(Err.invalid_request, Reason.NOT_YET_VALID)
        return datetime.fromtimestamp(at, UTC)

    def _read_event(self, claims: Claims, type: str, members: dict[str, Any]) -> Event:
        match type:
            case EventType.token_claims_change:
                changed = ClaimsChange.model_validate(members).claims
                return Event(type, roles=read_roles(changed.model_dump(exclude_unset=True)))
            case EventType.account_merged:
                into = Merge.model_validate(members).into
                self._check_subject(into)
                if into.sub == claims.sub_id.sub:
                    raise Rejected(Err.invalid_request, "An account cannot be merged into itself.")
                return Event(type, into=into.sub)
        return Event(type)


def _parse(token: bytes, *, longest_header: int) -> JWS:
    if token.find(b".") > longest_header:
        raise InvalidToken(Reason.MALFORMED)
    jws = parse_jws(token.decode("latin-1"))
    if jws.typ != TYPE:
        raise InvalidToken(Reason.BAD_TYPE)
    return jws
