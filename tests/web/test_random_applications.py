"""Random applications give the same responses with fast dispatch on and off, with the same side effects."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from tests.support.random_applications import CLOCK, Case, CountedRoute, Log, RandomRequest


@contextmanager
def logged() -> Iterator[Log]:
    """Collect the first line of each logged error."""
    lines: Log = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage().partition("\n")[0])

    logger, handler = logging.getLogger("backend"), Lines(logging.ERROR)
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


async def send(case: Case, request: RandomRequest, *, is_on: bool) -> Any:
    """Send a request; return its response, the log of the functions, and the logged errors."""
    case.log.clear()
    case.app.compiled_routes.start(is_on=is_on)
    with logged() as lines:
        response = await request.of(case.app)
    return response, list(case.log), lines


async def compare(case: Case, shares: Counter[str]) -> None:
    for request in case.requests:
        for _ in range(request.times):
            CLOCK["now"] += 1
            before = CountedRoute.fast["requests"]
            on, off = [await send(case, request, is_on=is_on) for is_on in (True, False)]
            shares["all"] += 1
            shares["fast"] += CountedRoute.fast["requests"] - before
            assert on == off, request


def check(examples: int) -> None:
    shares: Counter[str] = Counter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=True))
        def run(random: Random) -> None:
            case = Case.of(random)
            note(str(case))
            runner.run(compare(case, shares))

        run()
    assert shares["fast"] >= 0.3 * shares["all"], shares


def test_fast_dispatch_does_not_change_the_responses_of_random_applications() -> None:
    check(200)


@pytest.mark.full
def test_fast_dispatch_does_not_change_the_responses_of_many_random_applications() -> None:
    check(3_000)
