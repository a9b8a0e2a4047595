"""What is published about the API is what the API does: the OpenAPI snapshot, the types made from it, its examples."""

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
from backend.problems import Problem
from backend.tasks.schemas import TaskCreate, TaskRead, TaskUpdate
from backend.users.schemas import Me, MeUpdate

CONTRACT = Path(__file__).parents[1] / "frontend-contract"
DOCUMENT = create_app().openapi()
OPERATIONS = [
    pytest.param(path, operation, id=operation["operationId"])
    for path, operations in DOCUMENT["paths"].items()
    for operation in operations.values()
]


def test_the_snapshot_is_what_the_api_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openapi"]) == 0
    renew = ".venv/bin/resource-server openapi > frontend-contract/openapi.json"
    assert (CONTRACT / "openapi.json").read_text() == capsys.readouterr().out, f"renew it with: {renew}"


def check_types(folder: Path) -> int:
    generator = CONTRACT / "node_modules" / "openapi-typescript" / "bin" / "cli.js"
    options = json.loads((CONTRACT / "package.json").read_text())["scripts"]["schema"].split()[1:]
    command = [find_node(), str(generator), *options, "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def test_the_types_are_made_from_the_snapshot() -> None:
    assert check_types(CONTRACT) == 0, "renew them with: cd frontend-contract && npm run schema"


def test_the_check_of_the_types_can_fail(tmp_path: Path) -> None:
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
    for parameter in operation.get("parameters", []):
        assert parameter["in"] == "path" or parameter["schema"].get("description") or parameter.get("description")
    if path.startswith("/api/"):
        assert operation["security"] == [{"BetterAuth": []}]
        assert operation["description"]
        expected = {"400", "401", "403", "503"}
        expected |= {"404"} if "{id}" in path else set()
        expected |= {"413", "415", "422"} if "requestBody" in operation else set()
        assert expected <= set(operation["responses"])
    else:
        assert "security" not in operation
    for status, response in operation["responses"].items():
        kinds = set(response.get("content", {}))
        assert kinds == ({"application/problem+json"} if int(status) >= 400 and path != "/readyz" else kinds)
        assert kinds or status in ("204", "304")


def test_problems_are_what_is_documented() -> None:
    assert list(DOCUMENT["components"]["schemas"]["Problem"]["properties"]) == list(Problem.model_fields)
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]
