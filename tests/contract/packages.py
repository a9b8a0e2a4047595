"""A pytest plugin: the npm packages of the contract, and Node.js to run and pack them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from backend.dev.issuer import find_node

CONTRACT = Path(__file__).parents[2] / "frontend-contract"
CLIENT = CONTRACT / "client"
TSC = CONTRACT / "node_modules/typescript/bin/tsc"


def run(node: str, folder: Path, *arguments: str | Path, **environment: str) -> str:
    """What a program of Node.js prints; an assertion when it fails."""
    done = subprocess.run(
        [node, *arguments],
        cwd=folder,
        env={"PATH": f"{Path(node).parent}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def npm() -> Path:
    """npm's own program, for the Node.js that `find_node` found."""
    return Path(find_node()).parents[1] / "lib/node_modules/npm/bin/npm-cli.js"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be published."""
    node = find_node()
    shutil.rmtree(CLIENT / "dist", ignore_errors=True)
    run(node, CLIENT, npm(), "run", "build")
    folder = tmp_path_factory.mktemp("package")
    run(node, CLIENT, npm(), "pack", f"--pack-destination={folder}")
    (archive,) = folder.glob("*.tgz")
    return archive
