"""Verify Better Auth's tokens in any FastAPI app: judge the token, find the principal, say why not.

@asynccontextmanager
async def lifespan(app):
    async with RemoteKeys("https://auth.example.com/api/auth/jwks") as keys:
        verifier = TokenVerifier(keys=keys, issuers=["https://auth.example.com"], audiences=["https://api.example.com"])
        yield {"bearer": Bearer(verifier)}

router = APIRouter(route_class=BearerRoute)

@router.get("/me")
async def me(principal: CurrentPrincipal) -> dict[str, str]:
    return {"subject": principal.subject}
"""

from .bearer import (
    Bearer,
    BearerRoute,
    CurrentPerson,
    CurrentPrincipal,
    Refusal,
    Requirement,
    bearer_of,
    current_principal,
    forbidden,
    judge,
    read_token,
    requires_role,
    requires_scope,
)
from .claims import Principal
from .encoding import decode_object
from .errors import (
    AuthError,
    InvalidRequest,
    InvalidToken,
    KeysUnavailable,
    MissingToken,
    Reason,
    UnusableKeys,
)
from .jwk import Key, KeySet, SkippedKey
from .jws import JWS, parse_jws, verify_jws
from .keys import KeySource, KeysStatus, RemoteKeys, StaticKeys
from .observer import FetchReason, Observer
from .verifier import TokenVerifier, verify_signature

__all__ = [
    "JWS",
    "AuthError",
    "Bearer",
    "BearerRoute",
    "CurrentPerson",
    "CurrentPrincipal",
    "FetchReason",
    "InvalidRequest",
    "InvalidToken",
    "Key",
    "KeySet",
    "KeySource",
    "KeysStatus",
    "KeysUnavailable",
    "MissingToken",
    "Observer",
    "Principal",
    "Reason",
    "Refusal",
    "RemoteKeys",
    "Requirement",
    "SkippedKey",
    "StaticKeys",
    "TokenVerifier",
    "UnusableKeys",
    "bearer_of",
    "current_principal",
    "decode_object",
    "forbidden",
    "judge",
    "parse_jws",
    "read_token",
    "requires_role",
    "requires_scope",
    "verify_jws",
    "verify_signature",
]
