"""Removes the owner filter from statements, to test that row-level security works without it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from backend.database import Statement


def caller(statement: Statement) -> str:
    """A pattern of the parameter that is the caller's id in a statement."""
    return rf"\${statement.names.index('caller') + 1}::UUID" if "caller" in statement.names else "(?!)"


def owner_filter(statement: Statement) -> re.Pattern[str]:
    return re.compile(rf"(\w+\.owner_id|users\.id) = ({caller(statement)})")


def owned_insert(statement: Statement) -> re.Pattern[str]:
    return re.compile(rf"INSERT INTO \w+ \(owner_id, .*\) VALUES \({caller(statement)}, ")  # noqa: S608  # a pattern, not a statement


def without_owner(statement: Statement) -> str:
    return owner_filter(statement).sub(r"\2 IS NOT NULL", statement.sql)


@contextmanager
def forgotten_filter(*modules: ModuleType) -> Iterator[None]:
    """Remove the owner filter from all statements of these modules, also from those that are compiled later."""
    members = [member for module in modules for member in vars(module).values()]
    builders = [member for member in members if hasattr(member, "cache_clear")]
    original = Statement.__init__

    def init_without_owner(self: Statement, clause: Any, **options: Any) -> None:
        original(self, clause, **options)
        self.sql = without_owner(self)

    with pytest.MonkeyPatch.context() as patch:
        for statement in members:
            if isinstance(statement, Statement):
                patch.setattr(statement, "sql", without_owner(statement))
        for builder in builders:
            builder.cache_clear()
        patch.setattr(Statement, "__init__", init_without_owner)
        yield
    for builder in builders:
        builder.cache_clear()
