"""The route of /api/v1/security-events."""

from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from backend.auth import KeysUnavailable
from backend.web import openapi
from backend.web.proxies import client_network
from backend.web.rate_limits import RateLimited
from backend.web.request_state import request_state
from backend.web.requests import JSONRequest

from .schemas import Rejection
from .service import SecurityEvents
from .verification import Rejected

MEDIA_TYPE: Final = "application/secevent+jwt"
MAX_BODY: Final = 16 * 1024

router = APIRouter(prefix="/api/v1", tags=["users"])


@router.post(
    "/security-events",
    status_code=202,
    response_class=Response,
    responses={
        202: {"description": "The token is accepted, now or by an earlier request."},
        400: {
            "description": "The token is rejected; sending it again unchanged cannot succeed (RFC 8935).",
            "model": Rejection,
            "headers": {"Content-Language": {"description": "Language of the text.", "schema": {"type": "string"}}},
        },
        **openapi.responses(413, 415, 429, 500, 503),
    },
    openapi_extra={"requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}},
)
async def receive_security_event(request: Request) -> Response:
    """Receive a security event token (RFC 8417) of Better Auth: a ban, a sign-out, a change of roles, a deletion.

    Public: the token's signature authenticates the sender. docs/security-events.md lists the events.
    """
    state, address = request_state(request.scope), client_network(request.scope)
    events: SecurityEvents = request.state.security_events
    try:
        body = await JSONRequest(request.scope, request.receive, media_types=(MEDIA_TYPE,), limit=MAX_BODY).body()
        state.rate_limit = await events.receive(body, state.request_id, address)
    except RateLimited as limited:
        state.rate_limit = limited.decision
        raise
    except KeysUnavailable as error:
        events.quotas.fail(address)
        raise request.state.bearer.refusal(error) from None
    except (HTTPException, Rejected) as error:
        state.rate_limit = decision = events.quotas.fail(address)
        if decision.exceeded:
            raise events.quotas.reject(decision) from None
        if isinstance(error, Rejected):
            content = Rejection(err=error.err, description=str(error)).model_dump()
            return JSONResponse(content, 400, {"Content-Language": "en"})
        raise
    return Response(status_code=202)
