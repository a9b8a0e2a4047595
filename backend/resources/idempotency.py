"""Idempotency-Key: a request that is sent again is answered again, and done once.

The answer is kept in the transaction of the work, so that there is never one without the other. Named after
draft-ietf-httpapi-idempotency-key-header.
"""

import json
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Annotated
from uuid import UUID

from fastapi import Header, Request, Response
from sqlalchemy import (
    JSON,
    CheckConstraint,
    ColumnElement,
    DateTime,
    ForeignKey,
    Index,
    Text,
    bindparam,
    func,
    literal_column,
)
from sqlalchemy.dialects.postgresql import insert
from sqlmodel import Field, SQLModel, col, select

from backend.database import Database, Statement, Transaction, parameters
from backend.resources.models import CALLER
from backend.web.problems import DomainError

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="For 24 hours the same key and body get the first answer again, and nothing is done twice.",
        examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
    ),
]


class KeptAnswer(SQLModel, table=True):
    """What was answered to a request with an Idempotency-Key, which its owner alone can ask for again."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        CheckConstraint("char_length(key) between 1 and 255", name="idempotency_keys_length"),
        Index("idempotency_keys_to_purge", "created_at"),
    )

    owner_id: UUID = Field(primary_key=True, sa_column_args=[ForeignKey("users.id", ondelete="CASCADE")])
    key: str = Field(sa_type=Text, primary_key=True)
    fingerprint: bytes
    status: int
    headers: dict[str, str] = Field(sa_type=JSON)
    body: str = Field(sa_type=Text)
    created_at: datetime = Field(sa_type=DateTime(timezone=True), sa_column_kwargs={"server_default": func.now()})


# For OpenAPI.
REPLAYED = {
    "Idempotency-Replayed": {
        "description": "`true`: this is the answer of the first time.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}

MINE = col(KeptAnswer.owner_id) == CALLER
KEPT_FOR: ColumnElement[timedelta] = literal_column("interval '24 hours'")
FRESH = col(KeptAnswer.created_at) > func.now() - KEPT_FOR
KEY = bindparam("key", type_=Text)
LOCK = Statement(
    select(
        func.pg_try_advisory_xact_lock(
            func.hashtextextended(func.concat("idempotency key ", CALLER, " ", KEY), literal_column("0"))
        ).label("ours")
    )
)
FIND = Statement(
    select(col(KeptAnswer.fingerprint), col(KeptAnswer.status), col(KeptAnswer.headers), col(KeptAnswer.body)).where(
        MINE, col(KeptAnswer.key) == KEY, FRESH
    )
)
ANSWER = ("fingerprint", "status", "headers", "body")
_NEW = insert(KeptAnswer).values(owner_id=CALLER, key=KEY, **parameters(ANSWER))
KEEP = Statement(
    _NEW.on_conflict_do_update(
        index_elements=[col(KeptAnswer.owner_id), col(KeptAnswer.key)],
        set_={**{name: _NEW.excluded[name] for name in ANSWER}, "created_at": func.now()},
    ).returning(col(KeptAnswer.key))
)


class KeyInUse(DomainError):
    """A request with this Idempotency-Key is being worked on: ask again when it is done."""

    status, code = 409, "idempotency_key_in_use"


class KeyReused(DomainError):
    """This Idempotency-Key was sent with another request: a new request takes a new key."""

    status, code = 422, "idempotency_key_reused"
    errors = ({"loc": ["header", "Idempotency-Key"], "msg": "Take a new key", "type": "idempotency_key_reused"},)


async def once(
    database: Database, request: Request, key: str, work: Callable[[Transaction], Awaitable[Response]]
) -> Response:
    """The answer of `work`, or the one that it gave to this key and body before. Only a 2xx is kept.

    `work` runs in the transaction that keeps its answer, and may be called twice, like any `Database.transact`.
    """
    told = json.dumps([request.method, request.url.path, await request.json()], sort_keys=True)
    fingerprint = blake2b(told.encode(), digest_size=16).digest()

    async def work_or_answer(transaction: Transaction) -> Response:
        lock = await transaction.row(LOCK, key=key)
        if not (lock and lock["ours"]):
            raise KeyInUse
        kept = await transaction.row(FIND, key=key)
        if kept is None:
            response = await work(transaction)
            answer = {
                "fingerprint": fingerprint,
                "status": response.status_code,
                "headers": json.dumps(dict(response.headers)),
                "body": bytes(response.body).decode(),
            }
            await transaction.rows(KEEP, key=key, **answer)
            return response
        if kept["fingerprint"] != fingerprint:
            raise KeyReused
        return Response(kept["body"], kept["status"], {**kept["headers"], "Idempotency-Replayed": "true"})

    return await database.transact(work_or_answer)
