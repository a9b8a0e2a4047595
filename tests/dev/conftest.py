"""What the tests of a developer's machine share."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.dev.postgres import EmbeddedPostgres
from backend.settings import Settings


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may pass through, unlike pytest's own: as root, PostgreSQL runs as somebody else."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def made() -> Iterator[Path]:
    """The embedded server's data as a first start leaves them: making them is most of what a test would take."""
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
    """A working directory without `.env`, and an environment without the settings of whoever runs the tests."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(place)
    return place
