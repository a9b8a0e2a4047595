"""PostgreSQL: statements that always run as an actor, shared connections, and the pool."""

from .executor import (
    LEAST_SIZE,
    NOTICE_DEAD_CLIENT,
    SYSTEM,
    Actor,
    Cost,
    Database,
    Pool,
    Probe,
    Statement,
    Transaction,
    cut,
    parameters,
    with_keepalives,
)
from .pipeline import Connection, Row, UnreadableRow

__all__ = [
    "LEAST_SIZE",
    "NOTICE_DEAD_CLIENT",
    "SYSTEM",
    "Actor",
    "Connection",
    "Cost",
    "Database",
    "Pool",
    "Probe",
    "Row",
    "Statement",
    "Transaction",
    "UnreadableRow",
    "cut",
    "parameters",
    "with_keepalives",
]
