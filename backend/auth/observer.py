"""What can be counted from outside, without a metrics library."""

from enum import StrEnum
from typing import Literal


class FetchReason(StrEnum):
    """Why the key set is fetched."""

    REFRESH = "refresh"
    NO_KEYS = "no_keys"
    UNKNOWN_KID = "unknown_kid"
    BAD_SIGNATURE = "bad_signature"


class Observer:
    """Counts nothing: inherit and override what you count.

    The methods run on the event loop, in the middle of a request: they must be quick, and not raise.
    """

    def fetched(self, reason: FetchReason, seconds: float, error: str | None) -> None:
        """An attempt to fetch the key set has ended; `error` is None when it brought a usable set."""

    def unknown_kid(self, answer: Literal["found", "absent", "unavailable"]) -> None:
        """A token named a key that was not in the set."""

    def judged(self, outcome: str) -> None:
        """A token was judged: `hit` (cached), `verified`, `keys_unavailable`, or the lower-case name of a `Reason`."""
