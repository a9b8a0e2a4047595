"""Defines callbacks for metrics, independent of a metrics library."""

from enum import StrEnum
from typing import Literal


class FetchReason(StrEnum):
    """Why the key set is fetched."""

    REFRESH = "refresh"
    NO_KEYS = "no_keys"
    UNKNOWN_KID = "unknown_kid"
    BAD_SIGNATURE = "bad_signature"


class Observer:
    """Does nothing; override the methods whose events you count.

    The methods run on the event loop during a request: they must return quickly and must not raise.
    """

    def fetched(self, reason: FetchReason, seconds: float, error: str | None) -> None:
        """A fetch of the key set has ended; `error` is None if it returned a usable set."""

    def unknown_kid(self, answer: Literal["found", "absent", "unavailable"]) -> None:
        """A token named a key that was not in the cached set."""

    def judged(self, outcome: str) -> None:
        """A token was checked: `hit` (cached), `verified`, `keys_unavailable`, or the lower-case name of a `Reason`."""
