"""Request bodies: checks of media type and size, a time limit, and a strict JSON parser."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NoReturn

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope

JSON = ("application/json",)
BODY_SECONDS = 30.0
_BODY = "resource_server.body"
MERGE_PATCH = ("application/merge-patch+json", "application/json")


class JSONRequest(Request):
    """A request with a JSON body of an accepted media type and at most `limit` bytes.

    FastAPI's own `max_body_size` applies before authentication and responds in plain text; this limit applies when the
    body is read.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        *,
        media_types: tuple[str, ...],
        limit: int,
        source: Request | None = None,
    ) -> None:
        """`source`: a request that may have read the body already."""
        super().__init__(scope, receive)
        self._media_types = media_types
        self._limit = limit
        self._source = source

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body in chunks, of any media type; forms are read from it, too.

        Raises HTTPException: 413 above the limit, 408 after BODY_SECONDS.
        """
        source = super().stream() if self._source is None else self._source.stream()
        until, size = asyncio.get_running_loop().time() + BODY_SECONDS, 0
        length = self.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > self._limit:
            self._reject_size()
        while True:
            try:
                async with asyncio.timeout_at(until):
                    chunk = await anext(source, None)
            except TimeoutError:
                # The rest of the body must not be read as the next request.
                raise HTTPException(
                    408, "The request body was not received in time.", {"Connection": "close"}
                ) from None
            if chunk is None:
                return
            size += len(chunk)
            if size > self._limit:
                self._reject_size()
            yield chunk

    async def body(self) -> bytes:
        """Raises HTTPException: 415 for another media type or encoding, and those of `stream`."""
        if not hasattr(self, "_body"):
            headers = dict(reversed(self.scope["headers"]))  # the first of repeated headers
            length = headers.get(b"content-length")
            if length != b"0" and (length is not None or b"transfer-encoding" in headers):
                self._check_media_type(headers)
            self._body = self.scope[_BODY] = b"".join([chunk async for chunk in self.stream()])
        return self._body

    async def json(self) -> Any:
        """Rejects NaN, Infinity, lone surrogates, deep nesting, byte order marks and duplicate names."""
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
            raise HTTPException(
                415, f"The content type must be {' or '.join(self._media_types)}, without a content encoding."
            )

    def _reject_size(self) -> NoReturn:
        raise HTTPException(413, f"The request body is larger than {self._limit} bytes.")


def with_body(request: Request) -> Request:
    """Let a request return the body that a JSONRequest of the same scope has read, for handlers of errors."""
    if (body := request.scope.get(_BODY)) is not None:
        request._body = body  # noqa: SLF001  # no public attribute makes body() return it
    return request


def _reject_duplicate_names(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice in one object")


_DECODER = json.JSONDecoder(object_pairs_hook=_reject_duplicate_names)
