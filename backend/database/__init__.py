"""PostgreSQL: statements that always run as an actor, and the connections that they share."""

from .executor import Database, Transaction
from .pool import LEAST_SIZE, NOTICE_DEAD_CLIENT, Pool, Probe, cut, with_keepalives
from .query import Connection, Row, UnreadableRow
from .statements import SYSTEM, Actor, Cost, Statement, parameters

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
