"""Decides when the key set is fetched: the background schedule with its backoff, and the budget for other fetches."""

from collections.abc import Callable
from typing import Final

REFRESH_EVERY: Final = 60.0
JITTER: Final = 0.1
MIN_REFRESH: Final = 30.0  # lower and upper limit for Cache-Control: max-age
MAX_REFRESH: Final = 300.0
FIRST_BACKOFF: Final = 1.0
MAX_BACKOFF: Final = 30.0
BUDGET: Final = 2  # fetches that requests may start at once; after that, one every BUDGET_EVERY seconds
BUDGET_EVERY: Final = 5.0


class RefreshPolicy:
    """The time of the next background refresh and the fetches that requests may start, in monotonic seconds."""

    def __init__(self, now: float, random: Callable[[], float]) -> None:
        self.due = now
        self.not_before = now  # end of the pause that the endpoint requested with Retry-After
        self._random = random
        self._backoff = FIRST_BACKOFF
        self._budget: float = BUDGET
        self._budget_at = now

    def spend(self, now: float) -> bool:
        """Take one fetch from the budget; False when the budget is spent or the endpoint requested a pause."""
        if now < self.not_before:
            return False
        self._budget = min(BUDGET, self._budget + (now - self._budget_at) / BUDGET_EVERY)
        self._budget_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True

    def succeeded(self, started: float, max_age: float | None) -> None:
        """Schedule the next refresh after a fetch that began at `started`."""
        self._backoff = FIRST_BACKOFF
        interval = min(max(REFRESH_EVERY if max_age is None else max_age, MIN_REFRESH), MAX_REFRESH)
        jittered = interval * (1 + JITTER * (2 * self._random() - 1))
        self.due = started + min(max(jittered, MIN_REFRESH), MAX_REFRESH)

    def failed(self, now: float, retry_after: float, *, in_background: bool) -> None:
        """Schedule the next refresh after a failed fetch. Only background fetches increase the backoff."""
        self.not_before = now + retry_after
        if in_background:
            self.due = now + self._random() * self._backoff
            self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        self.due = max(self.due, self.not_before)
