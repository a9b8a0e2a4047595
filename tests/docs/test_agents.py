"""AGENTS.md: each block of commands succeeds in a copy of the checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkout import ROOT, Checkout

BLOCKS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "AGENTS.md").read_text(), re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"^make ", re.MULTILINE)
SLOW = re.compile(r"^make |^\.venv/bin/resource-server new ", re.MULTILINE)
NOT_COPIED = shutil.ignore_patterns("node_modules", "dist", ".next")


def copy(folder: Path, postgres: str) -> Checkout:
    checkout = Checkout(folder, postgres)
    for file in ROOT.iterdir():
        if file.is_file() and file.name not in {".env", ".git"}:
            shutil.copy(file, folder)
    for part in "benchmarks/load", "ops", "requirements":
        shutil.copytree(ROOT / part, folder / part, ignore=NOT_COPIED)
    # The web app's packages are larger than all others.
    shutil.copytree(ROOT / "frontend-contract", folder / "frontend-contract", ignore=NOT_COPIED)
    shutil.rmtree(folder / "frontend-contract/web")
    return checkout


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            id=block.partition("\n")[0].partition("  ")[0],
            marks=[
                *([pytest.mark.full] if SLOW.search(block) else []),
                *(pytest.mark.needs(tool) for tool in re.findall(r"^(make|npm) ", block, re.MULTILINE)),
            ],
        )
        for block in BLOCKS
    ],
)
def test_the_commands_succeed(tmp_path: Path, postgres: str, block: str) -> None:
    checkout = copy(tmp_path, postgres)
    checkout.run("backend.cli", "migrate")
    if not MAKE.search(block):
        # `make` would recreate this environment, because its path is another: such a block gets one of its own.
        (tmp_path / ".venv").symlink_to(sys.prefix)
        (tmp_path / "frontend-contract/node_modules").symlink_to(ROOT / "frontend-contract/node_modules")
    environment = {
        # The tests may run under make, whose variables would change this one.
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"},
        "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(sys.executable).parent}",
        "PYTHONPATH": str(tmp_path),
        "TEST_DATABASE_URL": postgres,
        "DATABASE_URL": checkout.url,
    }
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-euxo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
