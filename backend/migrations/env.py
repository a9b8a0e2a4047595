"""Run by Alembic: with the connection of `upgrade()`, or with one of its own for `alembic revision --autogenerate`."""

from alembic import context
from sqlmodel import SQLModel

import backend.app
from backend.migrations import _connect
from backend.settings import Settings

backend.app.create_app()  # imports every feature, so that its tables are known
connection = context.config.attributes.get("connection") or _connect(Settings().direct_url)
context.configure(connection=connection, target_metadata=SQLModel.metadata)
with context.begin_transaction():
    context.run_migrations()
