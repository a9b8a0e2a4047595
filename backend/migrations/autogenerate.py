"""What `alembic revision --autogenerate` adds to owned tables: privileges, policies, change numbers and links."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.migration import MigrationContext
from alembic.operations.ops import (
    AddColumnOp,
    AlterColumnOp,
    MigrateOperation,
    MigrationScript,
    ModifyTableOps,
    UpgradeOps,
)
from alembic.runtime.plugins import Plugin
from alembic.util import DispatchPriority, PriorityDispatchResult
from sqlalchemy import Column, Table, TypeDecorator, text
from sqlmodel import SQLModel

from backend.migrations import head
from backend.resources.links import Link

PLUGINS = ("alembic.autogenerate.*", "backend.migrations")

# What `isolate`, `number` and `link` have done to the tables that exist.
_STATE = """
SELECT c.relname,
       c.relforcerowsecurity AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polname = 'owner'),
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'number_change'),
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND t.tgname = 'show_new_links')
FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.relnamespace = current_schema()::regnamespace
"""


class TableSQL(MigrateOperation):
    """Executes the SQL of a function of `backend.migrations` for a table.

    `inverse`: the function of the downgrade. None: the downgrade drops the table.
    """

    def __init__(self, function: str | None, inverse: str | None, table: str, generated: Iterable[str] = ()) -> None:
        self.function = function
        self.inverse = inverse
        self.table = table
        self.generated = list(generated)

    def reverse(self) -> "TableSQL":
        return TableSQL(self.inverse, self.function, self.table, self.generated)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """For `alembic check`."""
        return self.function, self.table


@renderers.dispatch_for(TableSQL)
def _render(context: AutogenContext, operation: TableSQL) -> list[str]:
    if operation.function is None:
        return []
    context.imports.add(f"from backend.migrations import {operation.function}")
    is_generated = operation.function == "number" and operation.generated
    generated = f", generated={operation.generated}" if is_generated else ""
    return [f"op.execute({operation.function}({operation.table!r}{generated}))"]


class LinkSQL(MigrateOperation):
    """Executes the SQL of `link`, or of `unlink` in the downgrade."""

    def __init__(self, function: Literal["link", "unlink"], link: Link) -> None:
        self.function = function
        self.link = link

    def reverse(self) -> "LinkSQL":
        return LinkSQL("unlink" if self.function == "link" else "link", self.link)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """For `alembic check`."""
        return self.function, self.link.table.name


@renderers.dispatch_for(LinkSQL)
def _render_link(context: AutogenContext, operation: LinkSQL) -> list[str]:
    link = operation.link
    context.imports.add(f"from backend.migrations import {operation.function}")
    if operation.function == "unlink":
        return [f"op.execute(unlink({link.table.name!r}, labels={link.labels.name!r}))"]
    row, label = (column.name.removesuffix("_id") for column in (link.row_id, link.label_id))
    ends = f"{row}={link.rows.name!r}, {label}={link.labels.name!r}, names={link.shown.name!r}"
    return [f"op.execute(link({link.table.name!r}, {ends}))"]


def render_item(kind: str, item: Any, _: AutogenContext) -> str | Literal[False]:
    """Render SQLModel's types as those of SQLAlchemy that they store, which need no import."""
    is_sqlmodel = isinstance(item, TypeDecorator) and type(item).__module__.startswith("sqlmodel.")
    return f"sa.{item.impl_instance!r}" if kind == "type" and is_sqlmodel else False


def compare_owned_tables(context: AutogenContext, upgrade: UpgradeOps, _: set[str | None]) -> PriorityDispatchResult:
    """Add what owned tables lack, after the operations on tables and indexes."""
    assert context.connection is not None
    state = {name: row for name, *row in context.connection.exec_driver_sql(_STATE)}
    for table in context.sorted_tables:
        is_isolated, is_numbered, *_rest = state.get(table.name, (False, False))
        is_new = table.name not in state
        if "owner_id" in table.c and not is_isolated:
            upgrade.ops.append(TableSQL("isolate", None if is_new else "unisolate", table.name))
        if {"owner_id", "n", "deleted_at"} <= set(table.c.keys()) and not is_numbered:
            generated = [column.name for column in table.c if column.computed is not None]
            upgrade.ops += _number_rows(upgrade, table)
            upgrade.ops.append(TableSQL("number", None if is_new else "unnumber", table.name, generated))
    for link in SQLModel.metadata.info.get("links", []):
        if link.table.name not in state or not state[link.table.name][2]:
            upgrade.ops.append(LinkSQL("link", link))
    return PriorityDispatchResult.CONTINUE


def _number_rows(upgrade: UpgradeOps, table: Table) -> Iterator[AlterColumnOp]:
    """Give existing rows the number 0, which precedes every change, if the table gets the column `n`."""
    for group in upgrade.ops:
        if not isinstance(group, ModifyTableOps) or group.table_name != table.name:
            continue
        for operation in group.ops:
            if isinstance(operation, AddColumnOp) and operation.column.name == "n":
                kind = operation.column.type
                operation.column = Column("n", kind, server_default=text("0"), nullable=False)
                yield AlterColumnOp(
                    table.name,
                    "n",
                    existing_type=kind,
                    existing_nullable=False,
                    existing_server_default=None,
                    modify_server_default=None,
                )


def process_revision_directives(context: MigrationContext, _: object, scripts: list[MigrationScript]) -> None:
    """Choose the next number as the revision id, and write no file if there is nothing to do."""
    config = context.config
    assert config is not None
    options = config.cmd_opts
    (script,) = scripts
    assert script.upgrade_ops is not None
    if getattr(options, "autogenerate", False) and script.upgrade_ops.is_empty():
        config.print_stdout("the database has all tables and columns of the models: nothing to do")
        scripts.clear()
    elif getattr(options, "rev_id", None) is None:
        script.rev_id = f"{int(head()) + 1:04}"


Plugin("backend.migrations").add_autogenerate_comparator(compare_owned_tables, "schema", priority=DispatchPriority.LAST)
