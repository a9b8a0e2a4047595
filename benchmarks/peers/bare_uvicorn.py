"""The lower bound for HTTP in Python: uvicorn sending fixed bytes as long as this API's responses."""

import json

from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.peers.bare_fastapi import Page, task

REFUSED = {
    "type": "about:blank",
    "title": "Unauthorized",
    "status": 401,
    "detail": "This server does not check tokens",
    "code": "unauthenticated",
    "request_id": "x" * 32,
}


def create_app() -> ASGIApp:
    page = Page(items=[task(number) for number in range(20)], next_cursor="x" * 128)
    one, refused = task(1).model_dump_json().encode(), json.dumps(REFUSED, separators=(",", ":")).encode()
    answers = {"/api/v1/tasks": page.model_dump_json().encode()}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError  # uvicorn then runs without a lifespan
        del receive
        known = any(name == b"authorization" for name, _ in scope["headers"])
        status, body = (200, answers.get(scope["path"], one)) if known else (401, refused)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app
