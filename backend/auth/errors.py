"""Defines the exceptions of this package and the reasons for refusing a token."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a token is refused. Names are stable and used in metrics; values are `error_description`s (RFC 6750, 3)."""

    TOO_LONG = "The token is longer than 32 KiB."
    MALFORMED = "The token is not a well-formed JWT."
    OPAQUE_SESSION = "This is a session token: exchange it at <issuer>/token."
    BAD_HEADER = "The token header has a member that is not supported here."
    BAD_ALGORITHM = "The token is signed with an algorithm that is not allowed."
    BAD_KEY_ID = "The token header has no usable key id."
    BAD_TYPE = "The token is not of a type that is accepted here."
    BAD_ISSUER = "The token comes from another issuer."
    BAD_AUDIENCE = "The token is meant for another audience."
    BAD_TIMES = "The token has no usable exp, iat or nbf."
    EXPIRED = "The token has expired."
    NOT_YET_VALID = "The token is not valid yet."
    LIVES_TOO_LONG = "The token lives longer than is accepted here."
    BAD_SUBJECT = "The token has no usable subject."
    SENDER_CONSTRAINED = "The token is bound to a key whose possession cannot be proved here."
    INCOMPLETE = "The access token lacks a required claim."
    UNKNOWN_KEY = "The token is signed with a key that the issuer does not publish."
    BAD_SIGNATURE = "The token signature is not valid."
    REVOKED = "The token has been revoked."


class AuthError(Exception):
    """Base class of this package's exceptions. Messages never contain tokens, parts of tokens or claims."""


class MissingToken(AuthError):
    """The request carries no bearer token: 401 without an error code (RFC 6750, 3.1)."""


class InvalidRequest(AuthError):
    """The Authorization header is malformed: 400."""


class InvalidToken(AuthError):
    """The token is refused: 401. `str()` returns the `error_description`."""

    def __init__(self, reason: Reason, description: str | None = None) -> None:
        super().__init__(description or reason.value)
        self.reason = reason

    def __reduce__(self) -> tuple[type["InvalidToken"], tuple[Reason, str]]:
        return type(self), (self.reason, str(self))


class KeysUnavailable(AuthError):
    """Tokens cannot be verified because the issuer's keys are unavailable: 503. `retry_after` is in seconds."""

    def __init__(self, detail: str, retry_after: float = 1) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class UnusableKeys(AuthError):
    """A JWK or a JWK set cannot be used to verify signatures."""
