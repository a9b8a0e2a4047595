"""Run by Alembic: with the connection of `upgrade()`, or with one of its own for `alembic revision --autogenerate`."""

from alembic import context
from sqlmodel import SQLModel

import backend.tasks.models
import backend.users.models  # noqa: F401  # the tables must be known
from backend.migrations import _connect
from backend.settings import Settings

connection = context.config.attributes.get("connection") or _connect(Settings().direct_url)
context.configure(connection=connection, target_metadata=SQLModel.metadata)
with context.begin_transaction():
    context.run_migrations()
