"""A client that works with the last release works with the next, unless its version says otherwise."""

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backend.app import create_app
from tests.contract.compatibility import breaks, may_break

ROOT = Path(__file__).parents[2]
# The document of the last release, put there in the commit that is tagged. Until the first there is none, and nobody to
# whom a promise was made.
RELEASED = ROOT / "frontend-contract" / "openapi.released.json"
DOCUMENT = create_app().openapi()
TASKS, TASK = "/api/v1/tasks", "/api/v1/tasks/{id}"


def test_a_breaking_change_is_one_that_the_version_says() -> None:
    released = json.loads(RELEASED.read_text()) if RELEASED.exists() else DOCUMENT
    old, new = released["info"]["version"], DOCUMENT["info"]["version"]
    found = [] if may_break(old, new) else breaks(released, DOCUMENT)
    assert not found, f"clients of {old} would break; keep to it, or raise the version:\n" + "\n".join(found)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: S607


def test_the_released_document_is_that_of_the_last_tag() -> None:
    """Where the tags are known: a shallow clone, or an archive, has none."""
    tags = git("tag", "--list", "v*", "--sort=-version:refname").split()
    if tags:
        assert RELEASED.read_text() == git("show", f"{tags[0]}:frontend-contract/openapi.json")


@pytest.mark.parametrize(
    ("old", "new", "may"),
    [
        ("0.1.0", "0.1.1", False),
        ("0.1.9", "0.2.0", True),
        ("0.9.0", "1.0.0", True),
        ("1.2.0", "1.3.0", False),
        ("1.2.0", "2.0.0", True),
        ("2.0.0", "1.9.0", False),
        ("1.10.0", "1.9.0", False),
    ],
)
def test_what_a_version_may_do(old: str, new: str, may: bool) -> None:
    assert may_break(old, new) is may


def test_what_has_not_changed_breaks_nothing() -> None:
    assert breaks(DOCUMENT, copy.deepcopy(DOCUMENT)) == []


Change = Callable[[dict[str, Any]], Any]


def schema(name: str, document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["components"]["schemas"][name]
    return found


def members(name: str, document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema(name, document)["properties"]
    return found


def parameters(document: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["paths"][TASKS]["get"]["parameters"]
    return found


def parameter(name: str, document: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in parameters(document) if each["name"] == name)


NEW_PARAMETER = {"name": "x", "in": "query", "schema": {"type": "string"}}

# What the other document has, and what a client would stumble over; read backwards it is often harmless.
CHANGES: list[tuple[Change, list[str], list[str]]] = [
    (lambda d: d["paths"].pop(TASK), [f"{m} {TASK}: is gone" for m in ("DELETE", "GET", "PATCH", "PUT")], []),
    (lambda d: d["paths"][TASK].pop("patch"), [f"PATCH {TASK}: is gone"], []),
    (lambda d: parameters(d).append(NEW_PARAMETER), [], [f"GET {TASKS}: query x is no longer taken"]),
    (
        lambda d: parameters(d).append({**NEW_PARAMETER, "required": True}),
        [f"GET {TASKS}: query x is now required"],
        [f"GET {TASKS}: query x is no longer taken"],
    ),
    (
        lambda d: parameter("q", d).update(required=True),
        [f"GET {TASKS}: query q is now required"],
        [],
    ),
    (
        lambda d: parameter("limit", d)["schema"].update(maximum=50),
        [f"GET {TASKS}: query limit: maximum is now 50"],
        [],
    ),
    (
        lambda d: parameter("sort", d)["schema"]["enum"].remove("title"),
        [f"GET {TASKS}: query sort: is no longer taken as title"],
        [],
    ),
    # Sent and answered alike: fewer values are a broken request, more an answer that nobody expects.
    (
        lambda d: schema("Priority", d)["enum"].remove("urgent"),
        ["Priority (sent): is no longer taken as urgent"],
        ["Priority (answered): may now be urgent"],
    ),
    (lambda d: members("TaskRead", d).pop("version"), ["TaskRead (answered): version is gone"], []),
    (
        lambda d: schema("TaskRead", d)["required"].remove("version"),
        ["TaskRead (answered): version may be missing"],
        [],
    ),
    (
        lambda d: members("TaskRead", d).update(title={"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ["TaskRead (answered).title: may now be null"],
        [],
    ),
    (
        lambda d: members("TaskRead", d).update(version={"type": "string"}),
        ["TaskRead (answered).version: may now be string"],
        ["TaskRead (answered).version: may now be integer"],
    ),
    (
        lambda d: members("TaskCreate", d).pop("due_at"),
        ["TaskCreate (sent): due_at is no longer taken"],
        [],
    ),
    (
        lambda d: schema("TaskCreate", d)["required"].append("due_at"),
        ["TaskCreate (sent): due_at is now required"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d)["title"].update(maxLength=100, minLength=2),
        ["TaskCreate (sent).title: minLength is now 2", "TaskCreate (sent).title: maxLength is now 100"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d).update(due_at={"type": "string", "format": "date-time"}),
        ["TaskCreate (sent).due_at: is no longer taken as null"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d)["tags"]["items"].update(pattern="^a"),
        ["TaskCreate (sent).tags[]: pattern is now ^a"],
        [],
    ),
    (
        lambda d: members("TaskRead", d)["id"].pop("format"),
        ["TaskRead (answered).id: format is no longer uuid"],
        [],
    ),
    (
        lambda d: d["paths"][TASKS]["post"]["responses"].update({"202": d["paths"][TASKS]["post"]["responses"]["201"]}),
        [f"POST {TASKS}: 202 is new"],
        [f"POST {TASKS}: 202 is gone"],
    ),
    (lambda d: d["paths"][TASKS]["post"]["responses"].pop("409"), [], []),
    (
        lambda d: d["paths"][TASKS]["post"]["responses"]["201"]["headers"].pop("Location"),
        [f"POST {TASKS}: 201: header Location is gone"],
        [],
    ),
    (
        lambda d: d["paths"][TASK]["patch"]["requestBody"]["content"].pop("application/merge-patch+json"),
        [f"PATCH {TASK}: a body of application/merge-patch+json is no longer taken"],
        [],
    ),
    (
        lambda d: d["paths"][TASKS]["post"].pop("requestBody"),
        [f"POST {TASKS}: a body of application/json is no longer taken"],
        [f"POST {TASKS}: a body is now required"],
    ),
    (
        lambda d: d["paths"]["/livez"]["get"].update(security=[{"BetterAuth": []}]),
        ["GET /livez: asks for other credentials"],
        ["GET /livez: asks for other credentials"],
    ),
    (
        lambda d: schema("Batch", d)["properties"]["operations"]["items"]["oneOf"].pop(),
        ["Batch (sent).operations[]: is no longer taken as BatchDelete"],
        [],
    ),
    (
        lambda d: schema("Problem", d)["properties"].pop("code"),
        ["Problem (answered): code is gone"],
        [],
    ),
]


@pytest.mark.parametrize(("change", "forwards", "backwards"), CHANGES)
def test_what_breaks_a_client(change: Change, forwards: list[str], backwards: list[str]) -> None:
    changed = copy.deepcopy(DOCUMENT)
    change(changed)
    assert sorted(breaks(DOCUMENT, changed)) == sorted(forwards)
    assert sorted(breaks(changed, DOCUMENT)) == sorted(backwards)


def answering(schema: dict[str, Any], **components: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": schema}}
    return {
        "paths": {"/": {"get": {"responses": {"200": {"content": content}}}}},
        "components": {"schemas": components},
    }


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"type": "number"}, {"type": "integer"}, []),
        ({"type": "integer"}, {"type": "number"}, ["GET /: 200: may now be number"]),
        ({"type": ["string", "null"]}, {"type": "string"}, []),
        ({"anyOf": [{"type": "string", "format": "uri"}, {"type": "string", "format": "uuid"}]},
         {"type": "string", "format": "uri"}, []),
        ({"const": 1}, {"enum": [1, 2]}, ["GET /: 200: may now be 2"]),
        ({}, {"type": "string"}, []),
        ({"type": "string"}, {}, ["GET /: 200: may now be anything"]),
    ],
)  # fmt: skip
def test_what_an_answer_may_be(old: dict[str, Any], new: dict[str, Any], found: list[str]) -> None:
    assert breaks(answering(old), answering(new)) == found


def test_a_schema_may_hold_itself() -> None:
    tree = {
        "type": "object",
        "properties": {"of": {"$ref": "#/Tree"}, "name": {"type": "string"}},
        "required": ["name"],
    }
    other = {**tree, "required": []}
    old, new = (answering({"$ref": "#/Tree"}, Tree=each) for each in (tree, other))
    assert breaks(old, new) == ["Tree (answered): name may be missing"]
    assert breaks(new, old) == []
