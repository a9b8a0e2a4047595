"""Idempotency-Key: a repeated request gets the response of the first one and is not processed again.

The response is stored in the transaction of the write, so that one never exists without the other. See
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
        description="For 24 hours, requests with the same key and body get the first response.",
        examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
    ),
]


class StoredResponse(SQLModel, table=True):
    """The response to a request with an Idempotency-Key, readable by its owner only."""

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
        "description": "`true`: this is the stored response of the first request.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}

MINE = col(StoredResponse.owner_id) == CALLER
RETENTION: ColumnElement[timedelta] = literal_column("interval '24 hours'")
FRESH = col(StoredResponse.created_at) > func.now() - RETENTION
KEY = bindparam("key", type_=Text)
LOCK = Statement(
    select(
        func.pg_try_advisory_xact_lock(
            func.hashtextextended(func.concat("idempotency key ", CALLER, " ", KEY), literal_column("0"))
        ).label("acquired")
    )
)
FIND = Statement(
    select(
        col(StoredResponse.fingerprint),
        col(StoredResponse.status),
        col(StoredResponse.headers),
        col(StoredResponse.body),
    ).where(MINE, col(StoredResponse.key) == KEY, FRESH)
)
STORED = ("fingerprint", "status", "headers", "body")
_NEW = insert(StoredResponse).values(owner_id=CALLER, key=KEY, **parameters(STORED))
STORE = Statement(
    _NEW.on_conflict_do_update(
        index_elements=[col(StoredResponse.owner_id), col(StoredResponse.key)],
        set_={**{name: _NEW.excluded[name] for name in STORED}, "created_at": func.now()},
    ).returning(col(StoredResponse.key))
)


class KeyInUse(DomainError):
    """A request with this Idempotency-Key is still being processed. Try again later."""

    status, code = 409, "idempotency_key_in_use"


class KeyReused(DomainError):
    """This Idempotency-Key was used for a different request. Use a new key for each request."""

    status, code = 422, "idempotency_key_reused"
    errors = ({"loc": ["header", "Idempotency-Key"], "msg": "Use a new key", "type": "idempotency_key_reused"},)


async def once(
    database: Database, request: Request, key: str, work: Callable[[Transaction], Awaitable[Response]]
) -> Response:
    """The response of `work`, or the stored one for this key and body. Errors are raised, so only a 2xx is stored.

    `work` runs in the transaction that stores its response, and may be retried, as in `Database.transact`.
    """
    identity = json.dumps([request.method, request.url.path, await request.json()], sort_keys=True)
    fingerprint = blake2b(identity.encode(), digest_size=16).digest()

    async def work_or_replay(transaction: Transaction) -> Response:
        lock = await transaction.row(LOCK, key=key)
        if not (lock and lock["acquired"]):
            raise KeyInUse
        stored = await transaction.row(FIND, key=key)
        if stored is None:
            response = await work(transaction)
            values = {
                "fingerprint": fingerprint,
                "status": response.status_code,
                "headers": json.dumps(dict(response.headers)),
                "body": bytes(response.body).decode(),
            }
            await transaction.rows(STORE, key=key, **values)
            return response
        if stored["fingerprint"] != fingerprint:
            raise KeyReused
        return Response(stored["body"], stored["status"], {**stored["headers"], "Idempotency-Replayed": "true"})

    return await database.transact(work_or_replay)
