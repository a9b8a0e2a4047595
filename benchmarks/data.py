"""Seeds the same 200,000 tasks of 1,000 users for every server, and restores them after each turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString
from uuid import UUID

import psycopg

from backend import migrations
from benchmarks.workloads import NEW_TASK

TASKS = 200_000
USERS = 1_000

_USERS: LiteralString = """
INSERT INTO users (id, issuer, subject, email, name, claims_at)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, %s, 'user' || n,
       'user' || n || '@example.com', 'Ada Lovelace', now() - interval '1 day'
FROM generate_series(0, %s - 1) n
"""

# Oldest first, each user's tasks scattered over the heap, as when many users write at once.
_TASKS: LiteralString = """
INSERT INTO tasks (owner_id, n, title, description, status, priority, due_at, completed_at, created_at, updated_at)
SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n %% %(users)s), 12, '0'))::uuid, n + 1, %(title)s, %(description)s,
       (array['todo', 'in_progress', 'done'])[1 + n / %(users)s %% 3],
       (array['low', 'normal', 'high', 'urgent'])[1 + n / %(users)s %% 4],
       now() + (n %% 60 - 30) * interval '1 day',
       CASE WHEN n / %(users)s %% 3 = 2 THEN now() END,
       now() - (%(tasks)s - n) * interval '1 second', now()
FROM generate_series(0, %(tasks)s - 1) n
"""

_OWN: LiteralString = """
SELECT t.id FROM tasks t JOIN users u ON u.id = t.owner_id WHERE u.subject = %s ORDER BY t.created_at DESC LIMIT %s
"""


def seed(url: str, issuer: str, *, users: int = USERS, tasks: int = TASKS) -> None:
    """Migrate and fill the empty database at `url` with users `user0`, `user1` and so on of `issuer`."""
    migrations.upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(_USERS, (issuer, users))
        with numbered(connection):
            connection.execute(_TASKS, {**NEW_TASK, "users": users, "tasks": tasks})
        connection.execute("VACUUM (ANALYZE) users, tasks, change_counters")
        connection.execute("CHECKPOINT")


@contextmanager
def numbered(connection: psycopg.Connection) -> Iterator[None]:
    """Disable the triggers: inserted tasks contain their own change numbers and tag names."""
    connection.execute("ALTER TABLE tasks DISABLE TRIGGER number_change")
    connection.execute("ALTER TABLE task_tags DISABLE TRIGGER USER")
    yield
    connection.execute("ALTER TABLE task_tags ENABLE TRIGGER USER")
    connection.execute("ALTER TABLE tasks ENABLE TRIGGER number_change")
    connection.execute("INSERT INTO change_counters (owner_id, n) SELECT owner_id, max(n) FROM tasks GROUP BY owner_id")


def newest(url: str, subject: str, count: int) -> list[UUID]:
    """The ids of one user's newest `count` tasks."""
    with psycopg.connect(url) as connection:
        return [id for (id,) in connection.execute(_OWN, (subject, count))]


def restore(url: str) -> None:
    """Delete the tasks added since `seed`, and vacuum, so that no server is slowed down by another's writes."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DELETE FROM tasks WHERE due_at = %s", (NEW_TASK["due_at"],))  # no seeded task has this date
        connection.execute("VACUUM (ANALYZE) tasks, change_counters")
        connection.execute("CHECKPOINT")
