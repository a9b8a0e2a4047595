"""A copy of the project that a test can change, with a database of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from tests.conftest import create_database

ROOT = Path(__file__).parents[2]
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "node_modules", "results", "load", "images")


class Checkout:
    """`run` runs Python modules in the copy, on an empty database at `url`."""

    def __init__(self, folder: Path, postgres: str) -> None:
        for part in "backend", "benchmarks", "docs", "tests":
            shutil.copytree(ROOT / part, folder / part, ignore=_NOT_COPIED)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.folder = folder
        self.url = create_database(postgres, f"checkout_{uuid4().hex[:8]}")
        self._environment = os.environ | {
            "PYTHONPATH": str(folder),
            "TEST_DATABASE_URL": postgres,
            "DATABASE_URL": self.url,
        }

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    def replace(self, name: str, before: str, after: str) -> None:
        text = (self.folder / name).read_text()
        assert text.count(before) == 1, before
        self.write(name, text.replace(before, after))

    def migrations(self) -> list[str]:
        """The files of the migrations, oldest first."""
        return sorted(file.name for file in (self.folder / "backend/migrations/versions").glob("*.py"))

    def start(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *command: str, **environment: str) -> str:
        """The output of a command that must succeed."""
        done = self.start(*command, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
