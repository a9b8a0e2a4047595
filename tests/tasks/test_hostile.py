"""Every operation is called with what nobody should send: the answer is always one that the document promises."""

import json
from dataclasses import dataclass
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.app import create_app
from tests.conftest import Api

OPERATIONS = [
    (method.upper(), path, operation)
    for path, methods in create_app().openapi()["paths"].items()
    for method, operation in methods.items()
    if path.startswith("/api/")
]
STRINGS = st.sampled_from(
    [
        "", "\0", "'; DROP TABLE tasks; --", "%", "%(caller)s", "\\", "\ufffe", "\u202e", "\U0001f389", "NaN", "null",
        "1e400", "9" * 400, "-1", "2030-02-30T00:00:00Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
        "2030-01-01T00:00:00Z", "todo", "high", "title", "-due_at", "true", "exact", "*", '"1"', "../..", "x" * 300,
    ]
)  # fmt: skip
VALUES = st.recursive(
    STRINGS | st.text(max_size=10) | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MEMBERS = st.sampled_from(
    ["title", "description", "status", "priority", "due_at", "tags", "name", "operations", "time_zone", "locale", "id"]
)
BODIES = VALUES | st.dictionaries(MEMBERS, VALUES, max_size=4)


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    documented: frozenset[str]
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes | None


@st.composite
def calls(draw: st.DrawFn) -> Call:
    method, path, operation = draw(st.sampled_from(OPERATIONS))
    parameters = [(each["name"], each["in"]) for each in operation.get("parameters", []) if each["in"] != "path"]
    chosen = draw(st.lists(st.sampled_from(parameters), max_size=3, unique=True)) if parameters else []
    printable = STRINGS.filter(lambda text: text.isascii() and text.isprintable())
    id = draw(STRINGS.map(lambda text: quote(text, safe="")) | st.uuids().map(str))
    return Call(
        method,
        path.replace("{id}", id),
        frozenset(operation["responses"]) | (frozenset({"405"}) if "{id}" in path else frozenset()),
        {name: draw(STRINGS | st.text(max_size=10)) for name, where in chosen if where == "query"},
        {name: draw(printable) for name, where in chosen if where == "header"},
        json.dumps(draw(BODIES)).encode() if "requestBody" in operation else None,
    )


@given(call=calls())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_answer_is_one_that_is_documented(api: Api, call: Call) -> None:
    headers = call.headers | ({"Content-Type": "application/json"} if call.body is not None else {})
    response = await api.person(sub="hostile").request(
        call.method, call.path, headers=headers, params=call.query, content=call.body
    )
    assert response.status_code < 500, response.text
    assert str(response.status_code) in call.documented, response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
