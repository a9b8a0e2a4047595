"""Conformance with the OpenAPI document, for valid, invalid and hostile requests."""

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any, cast
from urllib.parse import quote
from uuid import UUID, uuid4

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis import checks
from schemathesis.core.failures import Failure
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.python import asgi
from starlette.types import Message, Receive, Scope, Send

from backend import migrations
from backend.app import create_app
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from tests.conftest import create_database

DOCUMENT = create_app().openapi()
OPERATIONS = [(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations]

# A valid request may fail only because of stored data: no such resource, or another version of it.
ACCEPTED = ["200", "201", "202", "204", "304", "404", "409", "410", "412"]
# schemathesis' default, and 413: an invalid body may be too long to be parsed.
REFUSED = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
CONFIG = {
    "seed": 1,
    "generation": {"deterministic": True, "max-examples": 25},
    # In a chain, the response of one call replaces the invalid values of the next.
    "phases": {"stateful": {"generation": {"mode": "positive"}}},
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ACCEPTED},
        "negative_data_rejection": {"expected-statuses": REFUSED},
    },
}
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(CONFIG))

# Reasons for a 422 that a schema cannot express.
NOT_IN_SCHEMA = {
    "invalid_cursor": "a cursor comes from the previous page",
    "invalid_sync_token": "a sync token comes from the feed",
    "idempotency_key_reused": "depends on an earlier request",
    "Value error, must not be blank": "needs Unicode categories, which many regular expression dialects lack",
    "Value error, must not contain NUL": "a pattern on every text would hide the patterns that matter",
    "Value error, is not a time zone of the IANA database, such as Europe/Berlin": "the database changes every year",
}

# Checks that need only the response.
GENERAL_CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@schemathesis.serializer("application/secevent+jwt")
def text_body(_: schemathesis.SerializationContext, value: Any) -> Any:
    return str(value).encode(errors="replace")


@SCHEMA.hook
def filter_failure(
    _: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: schemathesis.Response
) -> bool:
    if isinstance(failure, RejectedPositiveData) and case.media_type == "application/secevent+jwt":
        return False  # only the issuer can make an accepted event
    if not isinstance(failure, RejectedPositiveData) or response.status_code != 422:
        return True
    problem = response.json()
    reasons = {problem["code"]} if problem["code"] != "invalid" else {error["msg"] for error in problem["errors"]}
    return not reasons <= NOT_IN_SCHEMA.keys()


# Headers that their standards describe and that do not depend on the operation.
STANDARD_HEADERS = {
    "access-control-allow-origin", "access-control-expose-headers", "allow", "content-encoding", "content-length",
    "content-security-policy", "content-type", "referrer-policy", "vary", "x-content-type-options",
}  # fmt: skip


@schemathesis.check
def header_completeness(
    _: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """Every header is described; schemathesis itself checks that described headers are sent."""
    answers = DOCUMENT["paths"][case.path].get(case.method.lower(), {}).get("responses", {})
    if described := answers.get(str(response.status_code)):
        unknown = {name.lower() for name in response.headers} - {name.lower() for name in described["headers"]}
        assert not unknown - STANDARD_HEADERS


class Target:
    """Calls the application and disconnects from an event stream, which has no end, once it has started."""

    app: FastAPI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, sent, ended = asyncio.Event(), False, False

        async def receive_or_hang_up() -> Message:
            nonlocal sent
            if sent:
                await begun.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            sent = message["type"] == "http.request" and not message.get("more_body")
            return message

        async def watch(message: Message) -> None:
            nonlocal ended
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            if dict(message.get("headers", ())).get(b"content-type", b"").startswith(b"text/event-stream"):
                begun.set()

        await self.app(scope, receive_or_hang_up, watch)
        if begun.is_set() and not ended:
            await send({"type": "http.response.body"})


TARGET = SCHEMA.app = Target()


@pytest.fixture(scope="module")
def client(postgres: str, settings: Settings) -> Iterator[asgi.ASGIClient]:
    """Uses a database of its own, since the administrator changes other users."""
    url = create_database(postgres, f"schema_{uuid4().hex[:8]}")
    migrations.upgrade(url)
    TARGET.app = create_app(settings.model_copy(update={"database_url": url}))
    with asgi.get_client(cast(Any, TARGET)) as client:
        yield client
    asgi.shutdown_lifespans()


@pytest.fixture(scope="module")
def administrator(client: asgi.ASGIClient, issuer: LocalIssuer) -> dict[str, str]:
    """An administrator with another user and two resources of each kind, so that lists have a next page."""
    assert client.get("/api/v1/users/me", headers=bearer(issuer)).ok
    headers = bearer(issuer, role="admin")
    for path, operations in DOCUMENT["paths"].items():
        if {"get", "post"} <= operations.keys():
            for _ in range(2):
                client.post(path, json=example(operations["post"]), headers=headers)
    return headers


def bearer(issuer: LocalIssuer, **claims: Any) -> dict[str, str]:
    """The credentials of a new user."""
    return {"Authorization": f"Bearer {issuer.token(sub=uuid4().hex, **claims)}"}


def example(operation: dict[str, Any]) -> Any:
    """The first example of the operation's JSON body; None if it has no body."""
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    reference = schema.get("$ref", "").rpartition("/")[2]
    return DOCUMENT["components"]["schemas"][reference]["examples"][0] if reference else None


FindId = Callable[[str], str | None]


@pytest.fixture(scope="module")
def find_id(client: asgi.ASGIClient, administrator: dict[str, str]) -> FindId:
    """For each operation, the id of an existing resource other than the caller."""

    @cache  # one resource per operation, since an operation may delete it
    def find(operation: str) -> str | None:
        collection, one, _ = operation.partition(" ")[2].partition("/{id}")
        operations = DOCUMENT["paths"].get(collection, {})
        if not one or "get" not in operations:
            return None
        if "post" in operations:
            client.post(collection, json=example(operations["post"]), headers=administrator)
        own = client.get("/api/v1/users/me", headers=administrator).json()["id"]
        items = client.get(collection, headers=administrator).json()["items"]
        return next((item["id"] for item in items if item["id"] != own), None)

    return find


def is_uuid(value: object) -> bool:
    try:
        return bool(UUID(str(value)))
    except ValueError:
        return False


# A parameter makes the ids unique: without one, pytest 9.2 leaves the operation out of the id, and pytest-xdist runs
# one test per id.
@pytest.mark.parametrize("from_responses", [frozenset({"cursor", "since"})], ids=["generated"])
@SCHEMA.parametrize()
def test_every_operation_conforms_to_the_document(
    case: schemathesis.Case[Any], administrator: dict[str, str], find_id: FindId, from_responses: frozenset[str]
) -> None:
    """Requests name existing resources, and omit examples of values that come from earlier responses.

    from_responses: the query parameters with such values; so are all versions and keys in headers.
    """
    if is_uuid(case.path_parameters.get("id")) and (id := find_id(case.operation.label)):
        case.path_parameters["id"] = id
    assert case.meta
    if case.meta.generation.mode.is_positive:
        for parameter in DOCUMENT["paths"][case.path][case.method.lower()].get("parameters", []):
            name, sent = parameter["name"], case.headers if parameter["in"] == "header" else case.query
            is_example = sent.get(name) in parameter["schema"]["examples"]
            if is_example and (parameter["in"] == "header" or name in from_responses):
                del sent[name]
    case.call_and_validate(headers=administrator)


@pytest.mark.usefixtures("client")
def test_created_resources_exist_and_deleted_ones_are_gone(issuer: LocalIssuer) -> None:
    """Each chain of calls has a new user; a call sends values from the responses before it."""

    # The checker does not expect a restore, nor that deleting the user deletes everything.
    schema = SCHEMA.exclude(path_regex="/restore$").exclude(path="/api/v1/users/me", method="DELETE")
    # Administrators would suspend each other.
    schema = schema.exclude(path_regex="/admin/")

    class Chains(schema.as_state_machine()):  # type: ignore[misc]  # the base class is made at run time
        def setup(self) -> None:
            self.headers = bearer(issuer)

        def get_call_kwargs(self, _: schemathesis.Case[Any]) -> dict[str, Any]:
            return {"headers": self.headers}

    Chains.run(
        settings=hypothesis.settings(
            max_examples=20, stateful_step_count=8, deadline=None, derandomize=True, database=None
        )
    )


STRINGS = [
    "", "\0", "\ud800", "'; DROP TABLE tasks; --", "%", "%(caller)s", "\\", "\ufffe", "\u202e", "\U0001f389", "NaN",
    "null", "1e400", "9" * 400, "-1", "2030-02-30T00:00:00Z", "0001-01-01T00:00:00+23:59", "../..", "x" * 3000,
    "9999-12-31T23:59:59-23:59", "2030-01-01T00:00:00", "true", "*", '"1"', "00000000-0000-0000-0000-000000000000",
]  # fmt: skip
VALUES: list[Any] = [*STRINGS, None, True, -1, 10**400, 1.5, [], {}, [[[[]]]], {"\0": {"\ud800": []}}, ["\0"] * 3]
BODIES = [b"", b"\0", b"\xff", b"null", b"[" * 30_000, b'{"a":' * 5_000, b'{"title": 1e400}', b'{"title": NaN}']


def member_paths(value: Any, *member: str | int) -> Iterator[tuple[str | int, ...]]:
    """The paths of the value, its members, their members and so on."""
    yield member
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in members:
        yield from member_paths(inner, *member, name)


def replaced(value: Any, member: tuple[str | int, ...], new: Any) -> Any:
    if not member:
        return new
    copy = value.copy()
    copy[member[0]] = replaced(value[member[0]], member[1:], new)
    return copy


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_hostile_values_are_answered_as_documented(
    client: asgi.ASGIClient, administrator: dict[str, str], find_id: FindId, method: str, path: str
) -> None:
    """Each parameter and each member in turn, also with bodies that no JSON library would write."""
    operation = DOCUMENT["paths"][path][method]
    case = SCHEMA[path][method].Case()
    url = path.replace("{id}", find_id(f"{method.upper()} {path}") or str(UUID(int=0)))
    body = example(operation)
    kind = next(iter(operation.get("requestBody", {}).get("content", {})), None)
    sent = b"" if body is None else json.dumps(body).encode()

    def call(url: str, body: bytes = sent, more: dict[str, str] | None = None) -> None:
        headers: Any = administrator | ({"Content-Type": kind} if kind else {}) | (more or {})
        case.validate_response(client.request(method, url, data=body, headers=headers), checks=GENERAL_CHECKS)

    texts = [quote(text, safe="", errors="surrogatepass") for text in STRINGS]
    for parameter in operation.get("parameters", []):
        match parameter["in"]:
            case "path":
                for text in texts:
                    call(path.replace("{id}", text))
            case "query":
                for text in texts:
                    call(f"{url}?{parameter['name']}={text}")
            case "header":
                for text in [text for text in STRINGS if text.isascii() and text.isprintable()] + ["\xff"]:
                    call(url, more={parameter["name"]: text})
    for member, value in product(member_paths(body) if body else (), VALUES):
        call(url, json.dumps(replaced(body, member, value)).encode())
    for raw in BODIES if kind else ():
        call(url, raw)
