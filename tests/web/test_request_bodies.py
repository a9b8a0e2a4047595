"""The size limit of bodies that are not JSON. Forms and files are read from the same stream."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import APIRouter, Request, Response

from backend.operations.access_log import AccessLog
from backend.web.application import Application
from tests.support.public_route import PublicRoute, started


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("media_type", ["multipart/form-data; boundary=x", "application/octet-stream"])
async def test_a_stream_that_a_handler_reads_is_limited(media_type: str, *, is_chunked: bool) -> None:
    app, router = Application(compiled=PublicRoute), APIRouter(route_class=PublicRoute)

    @router.post("/stream")
    async def stream(request: Request) -> Response:
        return Response(str(sum([len(chunk) async for chunk in request.stream()])))

    async def chunks(content: bytes) -> AsyncIterator[bytes]:
        for offset in range(0, len(content), 10_000):
            yield content[offset : offset + 10_000]

    app.include_router(router)
    app.add_middleware(AccessLog)
    transport = httpx.ASGITransport(started(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for size, status in (PublicRoute.body_limit, 200), (PublicRoute.body_limit + 1, 413):
            content = b"a" * size
            body = chunks(content) if is_chunked else content
            answer = await http.post("/stream", content=body, headers={"Content-Type": media_type})
            assert answer.status_code == status
            assert answer.text == f"{size}" if status == 200 else answer.json()["code"] == "body_too_large"
