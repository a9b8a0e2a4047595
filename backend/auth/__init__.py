"""Verifies Better Auth's tokens in any FastAPI app. README.md shows how to use it."""

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
    verified_principal,
)
from .encoding import decode_object
from .errors import AuthError, InvalidRequest, InvalidToken, KeysUnavailable, MissingToken, Reason, UnusableKeys
from .jwk import Key, KeySet, SkippedKey
from .jwks_client import RemoteKeys
from .jws import JWS, parse_jws, verify_jws
from .key_source import KeySource, KeysStatus, StaticKeys
from .observer import FetchReason, Observer
from .principal import Principal
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
    "verified_principal",
    "verify_jws",
    "verify_signature",
]
