"""Request bodies: of the right kind, of a bounded size, and JSON without room for interpretation."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope

JSON = ("application/json",)
BODY_SECONDS = 30.0
MERGE_PATCH = ("application/merge-patch+json", "application/json")


class JSONRequest(Request):
    """A request whose body is JSON of a stated media type, at most `limit` bytes long.

    FastAPI's own `max_body_size` answers 413 to a request without a token, and as plain text; this one is asked only
    when the body is about to be read.
    """

    def __init__(self, scope: Scope, receive: Receive, *, media_types: tuple[str, ...], limit: int) -> None:
        super().__init__(scope, receive)
        self._media_types = media_types
        self._limit = limit

    async def body(self) -> bytes:
        """Raises 415 for another content type or an encoded body, 413 past the limit, 408 when it takes too long."""
        if not hasattr(self, "_body"):
            headers = dict(reversed(self.scope["headers"]))  # of several of one name the first counts
            length = headers.get(b"content-length")
            if length != b"0" and (length is not None or b"transfer-encoding" in headers):
                self._check_media_type(headers)
            if length is not None and length.isdigit() and int(length) > self._limit:
                self._refuse_size()
            chunks, size = [], 0
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for chunk in self.stream():
                        size += len(chunk)
                        if size > self._limit:
                            self._refuse_size()
                        chunks.append(chunk)
            except TimeoutError:
                # Whoever trickles shall not go on with what would have been the next request.
                raise HTTPException(408, "The body took too long.", {"Connection": "close"}) from None
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """Refuses what is often let pass: NaN, Infinity, lone surrogates, bottomless nesting, a BOM, a name twice."""
        body = await self.body()
        try:
            value = from_json(body, allow_inf_nan=False)
            _DECODER.decode(body.decode())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None
        return value

    def _check_media_type(self, headers: Mapping[bytes, bytes]) -> None:
        given = headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        if given not in self._media_types or headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HTTPException(415, f"Send {' or '.join(self._media_types)}, not encoded.")

    def _refuse_size(self) -> NoReturn:
        raise HTTPException(413, f"The body is longer than {self._limit} bytes.")


def _each_name_once(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one object")


_DECODER = json.JSONDecoder(object_pairs_hook=_each_name_once)
