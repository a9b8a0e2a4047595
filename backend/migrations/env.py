"""Alembic's environment: uses the connection of `upgrade()`, or opens one for `alembic revision --autogenerate`."""

from typing import Any

from alembic import context
from sqlalchemy import Column, Index
from sqlmodel import SQLModel

from backend.migrations import _connect
from backend.settings import Settings


def include_object(item: Any, _: object, __: object, ___: object, there: object) -> bool:
    """Ignore indexes on expressions that exist: PostgreSQL rewrites expressions, so Alembic would see a difference."""
    expression = isinstance(item, Index) and not all(isinstance(part, Column) for part in item.expressions)
    return not (expression and there is not None)


connection = context.config.attributes.get("connection")
if connection is None:
    from backend.app import create_app

    create_app()  # imports all features with their tables
    connection = _connect(Settings().direct_url)
context.configure(connection=connection, target_metadata=SQLModel.metadata, include_object=include_object)
with context.begin_transaction():
    context.run_migrations()
