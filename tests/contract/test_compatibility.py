"""Backward compatibility of the OpenAPI document: a breaking change requires a new version."""

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
# The document of the latest release, added in the tagged commit. It does not exist before the first release.
RELEASED = ROOT / "frontend-contract" / "openapi.released.json"
DOCUMENT = create_app().openapi()
TASKS, TASK = "/api/v1/tasks", "/api/v1/tasks/{id}"


def test_a_breaking_change_raises_the_version() -> None:
    released = json.loads(RELEASED.read_text()) if RELEASED.exists() else DOCUMENT
    old, new = released["info"]["version"], DOCUMENT["info"]["version"]
    found = [] if may_break(old, new) else breaks(released, DOCUMENT)
    assert not found, f"breaks clients of {old}; undo the change, or raise the version:\n" + "\n".join(found)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: S607


def test_the_released_document_is_that_of_the_latest_tag() -> None:
    """Passes where the tags are unknown, as in a shallow clone or an archive."""
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
def test_only_a_new_major_version_or_a_minor_below_1_may_break(old: str, new: str, may: bool) -> None:
    assert may_break(old, new) is may


def test_an_unchanged_document_breaks_nothing() -> None:
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

# A change, what it breaks, and what its reversal breaks.
CHANGES: list[tuple[Change, list[str], list[str]]] = [
    (lambda d: d["paths"].pop(TASK), [f"{m} {TASK}: was removed" for m in ("DELETE", "GET", "PATCH", "PUT")], []),
    (lambda d: d["paths"][TASK].pop("patch"), [f"PATCH {TASK}: was removed"], []),
    (lambda d: parameters(d).append(NEW_PARAMETER), [], [f"GET {TASKS}: query x is no longer accepted"]),
    (
        lambda d: parameters(d).append({**NEW_PARAMETER, "required": True}),
        [f"GET {TASKS}: query x is now required"],
        [f"GET {TASKS}: query x is no longer accepted"],
    ),
    (
        lambda d: parameter("sort", d)["schema"]["enum"].remove("title"),
        [f"GET {TASKS}: query sort: no longer accepts title"],
        [],
    ),
    # Used in requests and responses: a removed value breaks requests, an added one breaks the reader of responses.
    (
        lambda d: schema("Priority", d)["enum"].remove("urgent"),
        ["Priority (request): no longer accepts urgent"],
        ["Priority (response): may now be urgent"],
    ),
    (lambda d: members("TaskRead", d).pop("version"), ["TaskRead (response): version was removed"], []),
    (
        lambda d: schema("TaskRead", d)["required"].remove("version"),
        ["TaskRead (response): version may be missing"],
        [],
    ),
    (
        lambda d: members("TaskRead", d).update(title={"anyOf": [{"type": "string"}, {"type": "null"}]}),
        ["TaskRead (response).title: may now be null"],
        [],
    ),
    (
        lambda d: members("TaskRead", d).update(version={"type": "string"}),
        ["TaskRead (response).version: may now be string"],
        ["TaskRead (response).version: may now be integer"],
    ),
    (
        lambda d: members("TaskCreate", d).pop("due_at"),
        ["TaskCreate (request): due_at is no longer accepted"],
        [],
    ),
    (
        lambda d: schema("TaskCreate", d)["required"].append("due_at"),
        ["TaskCreate (request): due_at is now required"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d)["title"].update(maxLength=100, minLength=2),
        ["TaskCreate (request).title: minLength is now 2", "TaskCreate (request).title: maxLength is now 100"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d).update(due_at={"type": "string", "format": "date-time"}),
        ["TaskCreate (request).due_at: no longer accepts null"],
        [],
    ),
    (
        lambda d: members("TaskCreate", d)["tags"]["items"].update(pattern="^a"),
        ["TaskCreate (request).tags[]: pattern is now ^a"],
        [],
    ),
    (
        lambda d: members("TaskRead", d)["id"].pop("format"),
        ["TaskRead (response).id: format is no longer uuid"],
        [],
    ),
    (
        lambda d: d["paths"][TASKS]["post"]["responses"].update({"202": d["paths"][TASKS]["post"]["responses"]["201"]}),
        [f"POST {TASKS}: 202 is new"],
        [f"POST {TASKS}: 202 was removed"],
    ),
    (lambda d: d["paths"][TASKS]["post"]["responses"].pop("409"), [], []),
    (
        lambda d: d["paths"][TASKS]["post"]["responses"]["201"]["headers"].pop("Location"),
        [f"POST {TASKS}: 201: header Location was removed"],
        [],
    ),
    (
        lambda d: d["paths"][TASK]["patch"]["requestBody"]["content"].pop("application/merge-patch+json"),
        [f"PATCH {TASK}: a body of application/merge-patch+json is no longer accepted"],
        [],
    ),
    (
        lambda d: d["paths"][TASKS]["post"].pop("requestBody"),
        [f"POST {TASKS}: a body of application/json is no longer accepted"],
        [f"POST {TASKS}: a body is now required"],
    ),
    (
        lambda d: d["paths"]["/livez"]["get"].update(security=[{"BetterAuth": []}]),
        ["GET /livez: requires other credentials"],
        ["GET /livez: requires other credentials"],
    ),
    (
        lambda d: schema("Batch", d)["properties"]["operations"]["items"]["oneOf"].pop(),
        ["Batch (request).operations[]: no longer accepts BatchDelete"],
        [],
    ),
]


@pytest.mark.parametrize(("change", "forwards", "backwards"), CHANGES)
def test_breaking_changes_are_found_in_both_directions(
    change: Change, forwards: list[str], backwards: list[str]
) -> None:
    changed = copy.deepcopy(DOCUMENT)
    change(changed)
    assert sorted(breaks(DOCUMENT, changed)) == sorted(forwards)
    assert sorted(breaks(changed, DOCUMENT)) == sorted(backwards)


def document_of_response(schema: dict[str, Any], **components: Any) -> dict[str, Any]:
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
def test_a_response_may_only_become_narrower(old: dict[str, Any], new: dict[str, Any], found: list[str]) -> None:
    assert breaks(document_of_response(old), document_of_response(new)) == found


def test_a_schema_may_refer_to_itself() -> None:
    tree = {
        "type": "object",
        "properties": {"of": {"$ref": "#/Tree"}, "name": {"type": "string"}},
        "required": ["name"],
    }
    other = {**tree, "required": []}
    old, new = (document_of_response({"$ref": "#/Tree"}, Tree=each) for each in (tree, other))
    assert breaks(old, new) == ["Tree (response): name may be missing"]
    assert breaks(new, old) == []
