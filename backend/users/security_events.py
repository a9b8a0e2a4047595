"""Security Event Tokens (RFC 8417, 8935): what Better Auth says of a person, judged by its own signature, done once."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import col
from starlette.exceptions import HTTPException

from backend.auth import (
    JWS,
    InvalidToken,
    KeySource,
    KeysUnavailable,
    Reason,
    decode_object,
    parse_jws,
    verify_signature,
)
from backend.auth.claims import read_roles, without_unstorable
from backend.database import SYSTEM, Database, Pool, Statement, Transaction, parameters
from backend.users import lifecycle
from backend.users.audit import record
from backend.users.directory import Users
from backend.users.models import AuditSource, ReceivedEvent
from backend.web import openapi
from backend.web.proxies import neighbourhood
from backend.web.rate_limits import EventQuotas, RateLimited, Verdict
from backend.web.requests import JSONRequest

MEDIA_TYPE: Final = "application/secevent+jwt"
# Media types are compared without case; the prefix `application/` should be left out (RFC 8417, 2.3), so it has to be.
TYPE: Final = "secevent+jwt"
MAX_BODY: Final = 16 * 1024
MAX_HEADER: Final = 1024  # characters, from an address that has spent its quota: `alg`, `kid` and `typ` take 120
WINDOW: Final = 300.0  # seconds between `iat` and now: whoever sends one later signs it anew
LEEWAY: Final = 5.0  # seconds that a clock may differ
_LAST_SECOND: Final = 253402300799  # of the year 9999

# No row comes back when it was there. Whoever sends one twice at once waits for the first to be done, or to fail.
REMEMBER = Statement(
    insert(ReceivedEvent)
    .values(parameters(("issuer", "jti")))
    .on_conflict_do_nothing()
    .returning(col(ReceivedEvent.jti))
)


class EventType(StrEnum):
    account_disabled = "https://schemas.openid.net/secevent/risc/event-type/account-disabled"
    account_enabled = "https://schemas.openid.net/secevent/risc/event-type/account-enabled"
    account_purged = "https://schemas.openid.net/secevent/risc/event-type/account-purged"
    session_revoked = "https://schemas.openid.net/secevent/caep/event-type/session-revoked"
    token_claims_change = "https://schemas.openid.net/secevent/caep/event-type/token-claims-change"  # noqa: S105
    account_merged = "urn:better-auth-resource-server:event-type:account-merged"


class Err(StrEnum):
    """RFC 8935, section 2.4."""

    invalid_request = "invalid_request"
    invalid_key = "invalid_key"
    invalid_issuer = "invalid_issuer"
    invalid_audience = "invalid_audience"
    authentication_failed = "authentication_failed"
    access_denied = "access_denied"


class Rejection(BaseModel):
    """Why a security event token was not taken (RFC 8935, section 2.3)."""

    err: Err = Field(description="Stable: decide by it.")
    description: str = Field(description="For people; it may change.")


class Rejected(Exception):
    """The token is not taken. The text never holds a part of it."""

    def __init__(self, err: Err, description: str) -> None:
        super().__init__(description)
        self.err = err

    def answer(self) -> JSONResponse:
        content = Rejection(err=self.err, description=str(self)).model_dump()
        return JSONResponse(content, 400, {"Content-Language": "en"})


_ERR = {
    Reason.BAD_ALGORITHM: Err.invalid_key,
    Reason.BAD_KEY_ID: Err.invalid_key,
    Reason.UNKNOWN_KEY: Err.invalid_key,
    Reason.BAD_SIGNATURE: Err.authentication_failed,
}

Moment = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=_LAST_SECOND)]


class Subject(BaseModel):
    """RFC 9493, section 3.2.3."""

    format: Literal["iss_sub"]
    iss: str
    sub: Annotated[str, Field(min_length=1, max_length=255, pattern=r"\S")]


class Claims(BaseModel):
    """RFC 8417, section 2.2; the subject as in RFC 9493, section 4."""

    iss: str
    aud: str | list[str]
    iat: Moment
    jti: Annotated[str, Field(min_length=1, max_length=255)]
    sub_id: Subject
    toe: Moment | None = None
    exp: Moment | None = None
    nbf: Moment | None = None
    events: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


class ClaimsChange(BaseModel):
    """What a `token-claims-change` says of the claims that are kept here."""

    class Kept(BaseModel):
        role: Any = None  # whatever `read_roles` makes of it: a refused event would leave the old roles

    claims: Kept


class Merge(BaseModel):
    """What an `account-merged` says: into whom."""

    into: Subject


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `type` may be one that is not known here."""

    type: str
    roles: tuple[str, ...] | None = None
    into: str | None = None

    @property
    def action(self) -> str:
        """How the audit log calls it."""
        return re.split("[/:]", self.type)[-1] if self.type in set(EventType) else "unknown-event"

    @property
    def details(self) -> dict[str, Any]:
        match self.action:
            case "token-claims-change":
                return {"roles": self.roles}
            case "account-merged":
                return {"into": self.into}
            case "unknown-event":
                return {"event": self.type}
        return {}


@dataclass(frozen=True, slots=True)
class SecurityEvent:
    """What a token says that is well-formed, meant for us and of this time."""

    id: str
    subject: str
    at: datetime
    events: tuple[Event, ...]


class SecurityEvents:
    """Takes the security event tokens of one Better Auth server.

    `issuers`: its names, the first of which people are filed under. `audience`: what the tokens must be for. `clock`:
    seconds since 1970. `judged` hears of each token: `taken`, its Err, or `rate_limited`.
    """

    def __init__(
        self,
        pool: Pool,
        users: Users,
        *,
        keys: KeySource,
        issuers: Sequence[str],
        audience: str,
        clock: Callable[[], float] = time.time,
        judged: Callable[[str], None] | None = None,
        quotas: EventQuotas | None = None,
    ) -> None:
        self.quotas: Final = quotas or EventQuotas()
        self._database = Database(pool, SYSTEM)
        self._users = users
        self._keys = keys
        self._issuers = issuers
        self._audience = audience
        self._clock = clock
        self._judged = judged or (lambda _: None)

    async def take(self, token: bytes, request_id: str, address: str) -> Verdict:
        """Judge a token, and do what follows from it; nothing, when one of its `jti` was taken before.

        `address`: the sender's, whose quota of refused tokens decides how the token is judged. Returns what is left of
        the issuer's quota. Raises Rejected, RateLimited, KeysUnavailable or psycopg.Error. With all but the first it
        should be sent again.
        """
        try:
            event = await self._judge(token, address)
            verdict = self.quotas.verify({each.action for each in event.events})
            await self._database.transact(lambda transaction: self._apply(transaction, event, request_id))
        except Rejected as rejected:
            self._judged(rejected.err)
            raise
        except RateLimited:
            self._judged("rate_limited")
            raise
        self._judged("taken")
        # Other workers hear of it from the database; here it holds before the sender has the answer.
        for subject in (event.subject, *(each.into for each in event.events if each.into)):
            self._users.forget(subject)
        return verdict

    async def _judge(self, token: bytes, address: str) -> SecurityEvent:
        """Cheap checks first, cryptography last; what fails them takes no connection.

        The claims of 16 KiB take 30 times as long to read as a signature takes to verify, so an address that has spent
        its quota of refused tokens has its signatures verified first.
        """
        is_spent = self.quotas.is_spent(address)
        try:
            jws = _parse(token, longest_header=MAX_HEADER if is_spent else len(token))
            if is_spent:
                self.quotas.check()
                await verify_signature(jws, self._keys)
                return self._read(jws)
            event = self._read(jws)
            await verify_signature(jws, self._keys)
        except InvalidToken as error:
            raise Rejected(_ERR.get(error.reason, Err.invalid_request), error.reason) from None
        return event

    def _read(self, jws: JWS) -> SecurityEvent:
        try:
            claims = Claims.model_validate(without_unstorable(decode_object(jws.payload)))
            self._judge_names(claims)
            return SecurityEvent(
                id=claims.jti,
                subject=claims.sub_id.sub,
                at=self._judge_times(claims),
                events=tuple(self._read_event(claims, *event) for event in claims.events.items()),
            )
        except ValidationError as error:
            # The first part of the place is a name of ours, the rest may be the sender's.
            name = error.errors(include_input=False, include_context=False)[0]["loc"][0]
            raise Rejected(Err.invalid_request, f"{name} is missing or not what it should be.") from None
        except ValueError:
            raise InvalidToken(Reason.MALFORMED) from None

    def _judge_names(self, claims: Claims) -> None:
        if claims.iss not in self._issuers:
            raise Rejected(Err.invalid_issuer, Reason.BAD_ISSUER)
        if self._audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
            raise Rejected(Err.invalid_audience, Reason.BAD_AUDIENCE)
        self._judge_subject(claims.sub_id)

    def _judge_subject(self, subject: Subject) -> None:
        if subject.iss not in self._issuers:
            raise Rejected(Err.access_denied, "The subject is another issuer's.")

    def _judge_times(self, claims: Claims) -> datetime:
        now = self._clock()
        if abs(now - claims.iat) > WINDOW:
            raise Rejected(Err.invalid_request, "iat is not within five minutes of now: sign anew, check the clocks.")
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
                self._judge_subject(into)
                if into.sub == claims.sub_id.sub:
                    raise Rejected(Err.invalid_request, "An account cannot be merged into itself.")
                return Event(type, into=into.sub)
        return Event(type)

    async def _apply(self, transaction: Transaction, event: SecurityEvent, request_id: str) -> None:
        issuer = self._issuers[0]
        if await transaction.row(REMEMBER, issuer=issuer, jti=event.id) is None:
            return
        user = await lifecycle.ensure(transaction, issuer, event.subject)
        for each in event.events:
            done = await self._do(transaction, user["id"], event.at, each)
            await record(
                transaction,
                source=AuditSource.event,
                action=each.action,
                subject=event.subject,
                user_id=user["id"],
                details=each.details | {"jti": event.id, "toe": event.at.isoformat(), "done": done},
                request_id=request_id,
            )

    async def _do(self, transaction: Transaction, user_id: UUID, at: datetime, event: Event) -> bool:
        """Whether it had an effect: what came later may have been said before."""
        match event.type:
            case EventType.account_disabled:
                return await lifecycle.set_banned(transaction, user_id, True, at)
            case EventType.account_enabled:
                return await lifecycle.set_banned(transaction, user_id, False, at)
            case EventType.account_purged:
                await lifecycle.purge(transaction, user_id, at)
            case EventType.session_revoked:
                await lifecycle.revoke_tokens(transaction, user_id, at)
            case EventType.token_claims_change if event.roles is not None:
                return await lifecycle.set_roles(transaction, user_id, event.roles, at)
            case EventType.account_merged if event.into is not None:
                into = await lifecycle.ensure(transaction, self._issuers[0], event.into)
                return await lifecycle.merge(transaction, user_id, into["id"])
            case _:
                return False
        return True


def _parse(token: bytes, *, longest_header: int) -> JWS:
    if token.find(b".") > longest_header:
        raise InvalidToken(Reason.MALFORMED)
    jws = parse_jws(token.decode("latin-1"))
    if jws.typ != TYPE:
        raise InvalidToken(Reason.BAD_TYPE)
    return jws


router = APIRouter(prefix="/api/v1", tags=["users"])


@router.post(
    "/security-events",
    status_code=202,
    response_class=Response,
    responses={
        202: {"description": "It is taken, or was before."},
        400: {
            "description": "It is refused, and will be if sent again as it is (RFC 8935).",
            "model": Rejection,
            "headers": {"Content-Language": {"description": "That of `description`.", "schema": {"type": "string"}}},
        },
        **openapi.responses(413, 415, 429, 500, 503),
    },
    openapi_extra={"requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def receive_security_event(request: Request) -> Response:
    """Takes a security event token (RFC 8417) of Better Auth's: a ban, a sign-out, a change of roles, a deletion.

    Public: nothing but the token itself is judged. docs/security-events.md has the events.
    """
    state, address = request.state, neighbourhood(request.scope)
    events: SecurityEvents = state.security_events
    try:
        body = await JSONRequest(request.scope, request.receive, media_types=(MEDIA_TYPE,), limit=MAX_BODY).body()
        state.rate_limit = await events.take(body, state.request_id, address)
    except RateLimited as limited:
        state.rate_limit = limited.verdict
        raise
    except KeysUnavailable as error:
        events.quotas.fail(address)
        raise state.bearer.refusal(error) from None
    except (HTTPException, Rejected) as error:
        state.rate_limit = verdict = events.quotas.fail(address)
        if verdict.exceeded:
            raise events.quotas.refuse(verdict) from None
        if isinstance(error, Rejected):
            return error.answer()
        raise
    return Response(status_code=202)
