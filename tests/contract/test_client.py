"""The typed client: under each Node.js that is here, as a package, and against the real issuer and the real API."""

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from backend.dev.issuer import find_node
from tests.contract.packages import CLIENT, CONTRACT, TSC, npm, run

OLDEST_NODE = 20


def passed(output: str) -> int:
    found = re.search(r"^. pass (\d+)$", output, re.MULTILINE)
    assert found, output
    return int(found[1])


def nodes() -> dict[str, str]:
    """By version: the one that the issuer needs, and the machine's own where the client promises to run."""
    found = [find_node(), *filter(None, [shutil.which("node")])]
    versions = {subprocess.check_output([node, "--version"], text=True).strip(): node for node in reversed(found)}
    return {version: node for version, node in versions.items() if int(version[1:].split(".")[0]) >= OLDEST_NODE}


NODES = nodes()
each_node = pytest.mark.parametrize("node", NODES.values(), ids=NODES.keys())


@pytest.fixture(scope="session")
def compiled() -> Path:
    """The client's tests as JavaScript, which every Node.js can read."""
    run(find_node(), CLIENT, TSC, "-p", "tests")
    return CLIENT / "tests/dist/client/tests"


@each_node
def test_its_own_tests_pass(compiled: Path, node: str) -> None:
    assert passed(run(node, compiled, "--test", *sorted(compiled.glob("*.test.js")))) > 40


@each_node
def test_it_speaks_to_the_real_ones(compiled: Path, servers: Mapping[str, str], node: str) -> None:
    assert passed(run(node, compiled, "--test", "--test-reporter=spec", "real.js", **servers)) >= 10


def test_it_speaks_to_them_from_a_phone(compiled: Path, servers: Mapping[str, str]) -> None:
    """With what React Native has, and no more."""
    said = run(find_node(), compiled, "--import", "./phone.js", "--test-reporter=spec", "real.js", **servers)
    assert passed(said) >= 9
    assert "where there are no streams" in said
    assert "as it happens" not in said


def test_the_package_has_what_it_should(package: Path) -> None:
    with tarfile.open(package) as archive:
        names = {name.removeprefix("package/") for name in archive.getnames()}
        manifest = json.load(archive.extractfile("package/package.json") or pytest.fail("no manifest"))
    modules = {f"client/{path.stem}" for path in CLIENT.glob("*.ts")} | {"client"}
    code = {f"dist/{module}{suffix}" for module in modules for suffix in (".js", ".d.ts")}
    assert names == code | {"dist/schema.d.ts", "dist/LICENSE", "package.json", "README.md"}
    assert list(manifest["dependencies"]) == ["openapi-fetch"]


def test_the_package_works_in_a_folder_of_its_own(package: Path, servers: Mapping[str, str], tmp_path: Path) -> None:
    """Installed by npm; in plain JavaScript, and in TypeScript that checks the package's own declarations."""
    (tmp_path / "package.json").write_text('{"type": "module"}')
    # What the registry would give, so that nothing has to be fetched.
    found = [CONTRACT / "node_modules" / name for name in ("openapi-fetch", "openapi-typescript-helpers")]
    run(find_node(), tmp_path, npm(), "pack", *found)
    archives = [f"./{archive.name}" for archive in tmp_path.glob("*.tgz")]
    run(find_node(), tmp_path, npm(), "install", "--offline", "--no-audit", "--no-fund", package, *archives)
    program = """
        import { cookieSession, createClient, SignedOut } from "@frontend-contract/client";
        const { API_URL, AUTH_URL } = process.env;
        const api = createClient({ baseUrl: API_URL, token: cookieSession({ authUrl: AUTH_URL }) });
        await api.GET("/api/v1/tasks").catch((error) => console.log(error instanceof SignedOut));
    """
    (tmp_path / "app.js").write_text(program)
    for node in NODES.values():
        assert run(node, tmp_path, "app.js", **servers) == "true\n"
    (tmp_path / "app.ts").write_text(
        'import { createClient, tokenSource } from "@frontend-contract/client";\n'
        'const api = createClient({ baseUrl: "http://x", token: tokenSource(async () => "") });\n'
        'export const title: string = (await api.GET("/api/v1/tasks")).data.items[0]!.title;\n'
        "// @ts-expect-error no such member\n"
        'await api.POST("/api/v1/tasks", { body: { title, titel: "y" } });\n'
    )
    options = ["--strict", "--noEmit", "--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom,dom.iterable"]
    run(find_node(), tmp_path, TSC, *options, "app.ts")
