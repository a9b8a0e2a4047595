"""Run by Alembic: with the connection of `upgrade()`, or with one of its own for `alembic revision --autogenerate`."""

from typing import Any

from alembic import context
from sqlalchemy import Column, Index
from sqlmodel import SQLModel

from backend.migrations import _connect
from backend.settings import Settings


def include_object(item: Any, _: object, __: object, ___: object, there: object) -> bool:
    """An index on an expression that PostgreSQL has laid out anew is not taken for another one."""
    expression = isinstance(item, Index) and not all(isinstance(part, Column) for part in item.expressions)
    return not (expression and there is not None)


connection = context.config.attributes.get("connection")
if connection is None:
    from backend.app import create_app

    create_app()  # imports every feature, so that its tables are known
    connection = _connect(Settings().direct_url)
context.configure(connection=connection, target_metadata=SQLModel.metadata, include_object=include_object)
with context.begin_transaction():
    context.run_migrations()
