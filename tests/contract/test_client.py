"""The typed client: its own tests, its package, and requests to a real issuer and a real API."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from backend.dev.issuer import find_node
from tests.contract.packages import CLIENT, CONTRACT, TSC, npm, passed, run

OLDEST_NODE = 20


def major(version: str) -> int:
    return int(version[1:].split(".")[0])


def nodes() -> dict[str, str]:
    """Paths by version, oldest first: the Node.js of the issuer, and the machine's own if the client supports it."""
    found = [find_node(), *filter(None, [shutil.which("node")])]
    versions = {subprocess.check_output([node, "--version"], text=True).strip(): node for node in found}
    return {version: versions[version] for version in sorted(versions, key=major) if major(version) >= OLDEST_NODE}


NODES = nodes()
VERSIONS = list(NODES)


def on_each_node(*, in_gate: str) -> pytest.MarkDecorator:
    """Run a test with every Node.js, in the gate with one only."""
    return pytest.mark.parametrize(
        "node",
        [
            pytest.param(path, id=version, marks=() if version == in_gate else pytest.mark.full)
            for version, path in NODES.items()
        ],
    )


@pytest.fixture(scope="session")
def compiled_tests(client_copy: Path) -> Path:
    """The client's tests as JavaScript, since Node.js 20 cannot run TypeScript."""
    run(find_node(), client_copy, TSC, "-p", "tests")
    return client_copy / "tests/dist/client/tests"


@on_each_node(in_gate=VERSIONS[0])
def test_the_tests_of_the_client_pass(compiled_tests: Path, node: str) -> None:
    assert passed(run(node, compiled_tests, "--test", *sorted(compiled_tests.glob("*.test.js")))) > 40


@on_each_node(in_gate=VERSIONS[-1])
def test_the_client_works_with_the_real_servers(compiled_tests: Path, servers: Mapping[str, str], node: str) -> None:
    assert passed(run(node, compiled_tests, "--test", "--test-reporter=spec", "real.js", **servers)) >= 10


def test_the_client_needs_only_what_react_native_has(compiled_tests: Path, servers: Mapping[str, str]) -> None:
    arguments = "--import", "./phone.js", "--test-reporter=spec", "real.js"
    output = run(find_node(), compiled_tests, *arguments, **servers)
    assert passed(output) >= 9
    assert "by polling" in output
    assert "over a stream" not in output


def test_the_package_contains_each_module_and_its_types(package: Path) -> None:
    with tarfile.open(package) as archive:
        names = {name.removeprefix("package/") for name in archive.getnames()}
        manifest = json.load(archive.extractfile("package/package.json") or pytest.fail("no manifest"))
    modules = {f"client/{path.stem}" for path in CLIENT.glob("*.ts")} | {"client"}
    code = {f"dist/{module}{suffix}" for module in modules for suffix in (".js", ".d.ts")}
    assert names == code | {"dist/schema.d.ts", "dist/LICENSE", "package.json", "README.md"}
    assert list(manifest["dependencies"]) == ["openapi-fetch"]


def test_the_installed_package_works_in_javascript_and_typescript(
    package: Path, servers: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    # The dependencies come from the checkout, so that npm needs no network.
    dependencies = [CONTRACT / "node_modules" / name for name in ("openapi-fetch", "openapi-typescript-helpers")]
    run(find_node(), tmp_path, npm(), "pack", *dependencies)
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
