"""A pytest plugin: runs Node.js and npm, and builds the typed client's package."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from backend.dev.issuer import find_node

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "frontend-contract"
CLIENT = CONTRACT / "client"
TSC = CONTRACT / "node_modules/typescript/bin/tsc"
TYPESCRIPT_TESTS = (
    "--experimental-strip-types",
    "--disable-warning=ExperimentalWarning",
    "--test",
    "--test-reporter=spec",
)


def run(node: str, folder: Path, *arguments: str | Path, **environment: str) -> str:
    """Run Node.js in a folder and return its output; a failure is an assertion error with the output."""
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


def passed(output: str) -> int:
    """The number of passed tests in the output of `node --test`."""
    found = re.search(r"^. pass (\d+)$", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def npm() -> Path:
    """The npm of the Node.js that `find_node` returns."""
    return Path(find_node()).parents[1] / "lib/node_modules/npm/bin/npm-cli.js"


@pytest.fixture(scope="session")
def client_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the client's folder to build in: several test processes may build at once."""
    checkout = tmp_path_factory.mktemp("checkout")
    contract = checkout / CONTRACT.name
    shutil.copytree(CLIENT, contract / CLIENT.name, ignore=shutil.ignore_patterns("dist"))
    for name in "client.ts", "schema.d.ts", "package.json":
        shutil.copy(CONTRACT / name, contract)
    shutil.copy(ROOT / "LICENSE", checkout)
    (contract / "node_modules").symlink_to(CONTRACT / "node_modules")
    return contract / CLIENT.name


@pytest.fixture(scope="session")
def package(client_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of the client's package, as it would be published."""
    node = find_node()
    run(node, client_copy, npm(), "run", "build")
    folder = tmp_path_factory.mktemp("package")
    run(node, client_copy, npm(), "pack", f"--pack-destination={folder}")
    (archive,) = folder.glob("*.tgz")
    return archive
