"""Fixtures of the tests of the development environment."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.dev.postgres import EmbeddedPostgres
from backend.settings import Settings


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter, unlike `tmp_path`: under root, PostgreSQL runs as another user."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def initialized_data() -> Iterator[Path]:
    """The data of an embedded server, created once because initdb takes most of a test's time."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        with EmbeddedPostgres(Path(name, "data"), durable=False):
            pass
        yield Path(name, "data")


def copy_data(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    subprocess.run(["/bin/cp", "-a", source, target], check=True)


@pytest.fixture
def no_settings(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without `.env`, and an environment without the developer's own settings."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(place)
    return place
