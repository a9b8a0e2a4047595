"""Alembic's environment: uses the connection of `upgrade()`, or opens one for `alembic revision --autogenerate`."""

from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import Column, Index
from sqlmodel import SQLModel

from backend.migrations import _connect, autogenerate
from backend.settings import Settings


def include_object(item: Any, _: object, __: object, ___: object, there: object) -> bool:
    """Ignore indexes on expressions that exist: PostgreSQL rewrites expressions, so Alembic would see a difference."""
    expression = isinstance(item, Index) and not all(isinstance(part, Column) for part in item.expressions)
    return not (expression and there is not None)


connection = context.config.attributes.get("connection")
if connection is None:
    from backend.app import tables

    tables()
    url = Settings().direct_url
    if not url:
        raise CommandError("DATABASE_URL is not set: it must name a migrated database, such as the one of `make dev`")
    connection = _connect(url)
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    include_object=include_object,
    render_item=autogenerate.render_item,
    process_revision_directives=autogenerate.process_revision_directives,
    autogenerate_plugins=autogenerate.PLUGINS,
)
with context.begin_transaction():
    context.run_migrations()
