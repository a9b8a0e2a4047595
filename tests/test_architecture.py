"""The architecture: import rules, middleware, the state of requests, and access to the database."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from backend.app import ROUTERS, create_app

ROOT = Path(__file__).parents[1]
BACKEND = ROOT / "backend"
MODULES = sorted(BACKEND.rglob("*.py"))


def test_imports_run_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def imported(module: Path) -> set[str]:
    """The full names of the modules that it imports."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("feature", sorted({name.split(".")[1] for name in ROUTERS} - {"users"}))
def test_only_the_application_imports_a_feature(feature: str) -> None:
    """Features may import `users`, but not each other. The rule holds for each router that is listed."""
    own, name = BACKEND / feature, f"backend.{feature}"
    importers = [
        str(module.relative_to(BACKEND))
        for module in MODULES
        if not module.is_relative_to(own) and module.name != "app.py"
        if any(found == name or found.startswith(f"{name}.") for found in imported(module))
    ]
    assert importers == []


def test_middleware_is_pure_asgi() -> None:
    """A `BaseHTTPMiddleware` runs each request in a task of its own, behind a stream: about 150 us."""
    middleware = create_app().outer_middleware
    assert middleware
    for each in middleware:
        assert isinstance(each, type)
        assert not issubclass(each, BaseHTTPMiddleware)
    assert not [module for module in MODULES if "BaseHTTPMiddleware" in module.read_text()]


def test_requests_carry_no_untyped_state() -> None:
    """Middleware and routes share a RequestState. Only `backend.auth`, which stands alone, adds a string key."""
    key = r"""\bstate\b(["'\]]|\)|, \{\}\))*\[["']\w+["']\]( =|: \w+ =)"""
    attribute = r"\brequest\.state\.\w+ = "
    writers = {
        str(module.relative_to(BACKEND)) for module in MODULES if re.search(f"{key}|{attribute}", module.read_text())
    }
    assert writers == {"auth/bearer.py"}


def test_only_the_executor_runs_statements() -> None:
    """Pool, migrations, listener and doctor connect, and run statements of their own."""
    calls = {
        (str(module.relative_to(BACKEND)), node.func.attr)
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"execute", "executemany", "copy", "connect"}
        if not module.is_relative_to(BACKEND / "dev") and not module.is_relative_to(BACKEND / "migrations" / "versions")
    }
    assert calls == {
        ("database/executor.py", "execute"),
        ("database/pool.py", "connect"),
        ("database/pool.py", "execute"),
        ("doctor/stores.py", "connect"),
        ("doctor/stores.py", "execute"),
        ("migrations/__init__.py", "execute"),
        ("migrations/__init__.py", "connect"),
        ("web/rate_limits_redis.py", "execute"),  # of Redis
        ("users/cache_invalidation.py", "connect"),
        ("users/cache_invalidation.py", "execute"),
    }


@pytest.mark.parametrize("package", ["fastapi", "psycopg", "sqlalchemy", "starlette", "uvicorn"])
def test_a_package_whose_internals_are_used_is_limited_to_a_minor_version(package: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    ((major, minor, limit),) = re.findall(rf'^ +"{package}(?:\[[\w,]+\])?>=(\d+)\.(\d+),<([\d.]+)"', text, re.MULTILINE)
    assert limit == f"{major}.{int(minor) + 1}"
