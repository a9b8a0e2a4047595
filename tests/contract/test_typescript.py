"""The TypeScript of the contract: it compiles under the strictest rules, and its own tests pass."""

import re
import subprocess
from pathlib import Path

import pytest

from backend.dev.issuer import find_node

CONTRACT = Path(__file__).parents[2] / "frontend-contract"


def node(folder: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [find_node(), *arguments]
    return subprocess.run(command, cwd=CONTRACT / folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "folder", ["better-auth", "better-auth-oauth", "client", "client/tests", "mobile", "web", "web/tests"]
)
def test_it_compiles(folder: str) -> None:
    result = node(folder, str(CONTRACT / "node_modules/typescript/bin/tsc"), "--noEmit", "-p", ".")
    assert result.returncode == 0, result.stdout


def test_its_own_tests_pass() -> None:
    flags = "--experimental-strip-types", "--disable-warning=ExperimentalWarning", "--test"
    result = node("better-auth", *flags)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^. pass [1-9]", result.stdout, re.MULTILINE)
