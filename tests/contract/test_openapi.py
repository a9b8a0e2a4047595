"""The OpenAPI document: its snapshot, the TypeScript types made from it, examples and descriptions."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from backend.app import create_app
from backend.cli import main
from backend.dev.issuer import find_node
from backend.tasks.schemas import TaskCreate, TaskRead, TaskUpdate
from backend.users.schemas import Me, MeUpdate
from backend.web.problems import Problem

CONTRACT = Path(__file__).parents[2] / "frontend-contract"
DOCUMENT = create_app().openapi()
EVENTS = "/api/v1/security-events"  # public: the body is a signed token
OPERATIONS = [
    pytest.param(path, operation, id=operation["operationId"])
    for path, operations in DOCUMENT["paths"].items()
    for operation in operations.values()
]


def test_the_snapshot_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    renew = ".venv/bin/resource-server openapi > frontend-contract/openapi.json"
    assert (CONTRACT / "openapi.json").read_text() == capsys.readouterr().out, f"update it with: {renew}"


def check_types(folder: Path) -> int:
    generator = CONTRACT / "node_modules" / "openapi-typescript" / "bin" / "cli.js"
    options = json.loads((CONTRACT / "package.json").read_text())["scripts"]["schema"].split()[1:]
    command = [find_node(), str(generator), *options, "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def test_the_types_are_up_to_date() -> None:
    assert check_types(CONTRACT) == 0, "update them with: cd frontend-contract && npm run schema"


def test_outdated_types_are_detected(tmp_path: Path) -> None:
    changed = json.loads((CONTRACT / "openapi.json").read_text())
    del changed["components"]["schemas"]["TaskRead"]["properties"]["title"]
    (tmp_path / "openapi.json").write_text(json.dumps(changed))
    shutil.copy(CONTRACT / "schema.d.ts", tmp_path)
    assert check_types(tmp_path) == 1


@pytest.mark.parametrize("model", [Me, MeUpdate, TaskCreate, TaskRead, TaskUpdate])
def test_every_example_is_valid(model: type[Any]) -> None:
    schema = DOCUMENT["components"]["schemas"][model.__name__]
    assert schema["examples"]
    for example in schema["examples"]:
        TypeAdapter(model).validate_python(example)


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_every_operation_is_documented(path: str, operation: dict[str, Any]) -> None:
    assert operation["tags"]
    assert operation["summary"]
    assert operation["description"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]
        assert parameter["schema"]["examples"], parameter["name"]
    if path == EVENTS:
        assert "security" not in operation
        assert {"202", "400", "413", "415", "503"} <= set(operation["responses"])
    elif path.startswith("/api/"):
        assert [set(scheme) for scheme in operation["security"]] == [{"BetterAuth"}]
        expected = {"400", "401", "403", "503"}
        expected |= {"404"} if "{id}" in path else set()
        expected |= {"413", "415", "422"} if "requestBody" in operation else set()
        assert expected <= set(operation["responses"])
    else:
        assert "security" not in operation
    for status, response in operation["responses"].items():
        kinds = set(response.get("content", {}))
        own = path == "/readyz" or (path, status) == (EVENTS, "400")  # RFC 8935 defines its own errors
        assert kinds == ({"application/problem+json"} if int(status) >= 400 and not own else kinds)
        assert kinds or status in ("202", "204", "304")
        assert response["description"]
        assert common_headers(path, status, response) <= set(response["headers"])


def common_headers(path: str, status: str, response: dict[str, Any]) -> set[str]:
    """The headers of every response of this kind."""
    always = {"X-Request-ID", "Cache-Control"} | (
        {"RateLimit", "RateLimit-Policy"} if path.startswith("/api/") else set()
    )
    if "application/problem+json" not in response.get("content", {}):
        return always | ({"ETag"} if status == "304" else set())
    return always | {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}.get(status, set())


def test_every_header_is_described() -> None:
    for name, header in DOCUMENT["components"]["headers"].items():
        assert header["description"], name
        assert header["schema"], name


# Members that need no description.
SELF_EVIDENT = {"id", "created_at", "updated_at", "todo", "in_progress", "done", "op", "task", "changes"}


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_every_schema_and_its_members_are_described(name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][name]
    assert "enum" in schema or schema.get("description")
    undescribed = {member for member, its in schema.get("properties", {}).items() if not its.get("description")}
    assert undescribed <= SELF_EVIDENT


def test_the_problem_schema_has_the_members_of_the_model() -> None:
    assert list(DOCUMENT["components"]["schemas"]["Problem"]["properties"]) == list(Problem.model_fields)
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]
