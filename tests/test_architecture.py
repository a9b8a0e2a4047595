"""The rules of the house: who may import whom, and that nothing goes past the executor."""

import ast
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
    """The modules that it imports, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("feature", sorted({name.split(".")[1] for name in ROUTERS} - {"users"}))
def test_a_feature_is_known_to_the_application_alone(feature: str) -> None:
    """Every feature may know `users`, and none another; a new one is bound by this without being named here."""
    own, name = BACKEND / feature, f"backend.{feature}"
    strangers = [
        str(module.relative_to(BACKEND))
        for module in MODULES
        if not module.is_relative_to(own) and module.name != "app.py"
        if any(found == name or found.startswith(f"{name}.") for found in imported(module))
    ]
    assert strangers == []


def test_no_middleware_costs_more_than_the_request() -> None:
    """A `BaseHTTPMiddleware` runs each request in a task of its own, behind a stream: about 150 us."""
    app = create_app()
    assert app.user_middleware
    for middleware in app.user_middleware:
        assert isinstance(middleware.cls, type)
        assert not issubclass(middleware.cls, BaseHTTPMiddleware)
    assert not [module for module in MODULES if "BaseHTTPMiddleware" in module.read_text()]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_states_its_promise(module: Path) -> None:
    source = module.read_text()
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), "no docstring"


def test_only_the_executor_speaks_to_the_database() -> None:
    """Pool, migrations, listener and doctor connect; the executor runs statements, they their own."""
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
        ("users/notifications.py", "connect"),
        ("users/notifications.py", "execute"),
    }
