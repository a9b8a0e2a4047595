"""Services as a careless colleague would have left them: row-level security must hold without their filter."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from backend.database import Statement

OWNER_FILTER = re.compile(r"(\w+\.owner_id|users\.id) = %\(caller\)s::UUID")


def without_owner(sql: str) -> str:
    return OWNER_FILTER.sub("%(caller)s::UUID IS NOT NULL", sql)


@contextmanager
def forgotten_filter(*modules: ModuleType) -> Iterator[None]:
    """No statement of these modules asks who the owner is, neither those made at import nor those made later."""
    members = [member for module in modules for member in vars(module).values()]
    shapes = [member for member in members if hasattr(member, "cache_clear")]
    original = Statement.__init__

    def careless(self: Statement, clause: Any) -> None:
        original(self, clause)
        self.sql = without_owner(self.sql)

    with pytest.MonkeyPatch.context() as patch:
        for statement in members:
            if isinstance(statement, Statement):
                patch.setattr(statement, "sql", without_owner(statement.sql))
        for shape in shapes:
            shape.cache_clear()
        patch.setattr(Statement, "__init__", careless)
        yield
    for shape in shapes:
        shape.cache_clear()
