"""The schema check of `/readyz`: concurrent callers share one query, and errors are not hidden."""

import asyncio
from typing import cast

import pytest

from backend.database import Probe, Row
from backend.operations import health
from backend.operations.health import SchemaCheck


class FakeProbe:
    """A probe that responds on command with a revision or an error."""

    def __init__(self) -> None:
        self.queries = 0
        self.result: str | Exception = "0001"
        self.may_respond = asyncio.Event()

    async def rows(self, _: str) -> list[Row]:
        self.queries += 1
        await self.may_respond.wait()
        if isinstance(self.result, Exception):
            raise self.result
        return [{"version_num": self.result}]


def check(probe: FakeProbe) -> SchemaCheck:
    return SchemaCheck(cast(Probe, probe), "0001")


async def test_a_cancelled_caller_does_not_affect_others_waiting_for_the_same_check() -> None:
    probe = FakeProbe()
    schema = check(probe)
    first, second = (asyncio.create_task(schema.status()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    probe.may_respond.set()
    assert await second == "ok"
    assert first.cancelled()
    assert await schema.status() == "ok"
    assert probe.queries == 1


async def test_an_unexpected_error_is_raised_and_not_replaced_by_an_old_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "MAX_AGE", 0.0)
    probe = FakeProbe()
    probe.may_respond.set()
    schema = check(probe)
    assert await schema.status() == "ok"
    probe.result = RuntimeError("not foreseen")
    with pytest.raises(RuntimeError, match="not foreseen"):
        await schema.status()
    probe.result = "0001"
    assert await schema.status() == "ok"
