"""The web app is built once per change of its sources; an incomplete build is never used."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from backend.dev import web
from backend.dev.issuer import IssuerError

BUILD = """
import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
mkdirSync(".next", { recursive: true });
appendFileSync("../builds", "one\\n");
console.log("the last words");
const what = readFileSync("app/page.tsx", "utf8");
if (what === "hang") {
  writeFileSync("../started", String(process.pid));
  setInterval(() => {}, 1000);
}
process.exitCode = what === "wrong" ? 3 : 0;
"""


@pytest.fixture
def contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A contract whose build program counts its runs."""
    contract = tmp_path / "frontend-contract"
    app = contract / "web"
    for name in ("app", "tests", "node_modules/next/dist/bin"):
        (app / name).mkdir(parents=True)
    (app / "node_modules" / "package.json").write_text('{"type": "module"}')
    (app / "node_modules" / "next" / "dist" / "bin" / "next").write_text(BUILD)
    (app / "app" / "page.tsx").write_text("as it should")
    (contract / "client").mkdir()
    monkeypatch.setattr(web, "CONTRACT", contract)
    monkeypatch.setattr(web, "WEB", app)
    monkeypatch.setattr(web, "_NEXT", app / "node_modules" / "next" / "dist" / "bin" / "next")
    monkeypatch.setattr(web, "_STAMP", app / ".next" / "built-of")
    return contract


@pytest.fixture
def built(contract: Path) -> Callable[[], bool]:
    """Call `build`; return whether it built anything."""
    said: list[str] = []
    assert web.WEB.parent == contract

    def build() -> bool:
        said.clear()
        web.build(said.append)
        assert said in ([], ["building the web app (needed once per change of its sources)"])
        return bool(said)

    return build


def builds(contract: Path) -> int:
    return len((contract / "builds").read_text().splitlines())


@pytest.mark.parametrize(
    "path", ["web/app/page.tsx", "web/new.css", "client.ts", "client/tokens.ts", "package-lock.json"]
)
def test_a_changed_source_causes_one_build(contract: Path, built: Callable[[], bool], path: str) -> None:
    assert built()
    assert not built()
    (contract / path).write_text("changed")
    assert built()
    assert not built()
    assert builds(contract) == 2


@pytest.mark.parametrize(
    "path", ["web/README.md", "web/tests/a.test.ts", "web/node_modules/a.js", "web/.next/a.js", "web/.data/a.sqlite"]
)
def test_a_change_of_another_file_causes_no_build(contract: Path, built: Callable[[], bool], path: str) -> None:
    assert built()
    (contract / path).parent.mkdir(exist_ok=True)
    (contract / path).write_text("changed")
    assert not built()


def test_a_deleted_build_is_repeated(contract: Path, built: Callable[[], bool]) -> None:
    assert built()
    shutil.rmtree(contract / "web" / ".next")
    assert built()


def test_a_failed_build_shows_its_output_and_is_repeated(contract: Path, built: Callable[[], bool]) -> None:
    (contract / "web" / "app" / "page.tsx").write_text("wrong")
    for _ in range(2):
        with pytest.raises(IssuerError, match=r"^the build of the web app failed:\nthe last words$"):
            built()
    assert builds(contract) == 2


def test_without_next_js_the_error_names_the_command(contract: Path, built: Callable[[], bool]) -> None:
    shutil.rmtree(contract / "web" / "node_modules")
    with pytest.raises(IssuerError, match=rf"^Next.js is not installed: run `npm ci` in {contract}/web$"):
        built()


def test_an_interrupted_build_leaves_no_process_and_is_repeated(contract: Path, built: Callable[[], bool]) -> None:
    page = contract / "web" / "app" / "page.tsx"
    page.write_text("hang")
    program = f"""
import signal
from pathlib import Path
from backend.dev import web
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores SIGINT by default
web.CONTRACT, web.WEB = Path({str(contract)!r}), Path({str(contract / "web")!r})
web._NEXT, web._STAMP = web.WEB / "node_modules/next/dist/bin/next", web.WEB / ".next/built-of"
web.build(lambda _: None)
"""
    os.mkfifo(contract / "started")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    pid = int((contract / "started").read_text())  # blocks until the build writes its process id
    process.send_signal(signal.SIGINT)
    process.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    page.write_text("as it should")
    assert built()
