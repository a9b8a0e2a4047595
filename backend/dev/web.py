"""Builds the web app for production, again only when its sources have changed."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from backend.dev import parent_watchdog
from backend.dev.issuer import CONTRACT, IssuerError, find_node

WEB = CONTRACT / "web"
_BUILT = WEB / ".next"
_STAMP = _BUILT / "built-of"
_NEXT = WEB / "node_modules" / "next" / "dist" / "bin" / "next"
# Sources outside the app's own folder.
_SHARED_SOURCES = ("client.ts", "client/*.ts", "better-auth/*.ts", "package-lock.json")
_NOT_SOURCES = {".data", ".next", "node_modules", "tests", "next-env.d.ts"}


def build(say: Callable[[str], None]) -> None:
    """Build the app unless its build is up to date; takes about 30 s, which `say` announces.

    A lock keeps two builds of one checkout apart. An interrupted build leaves no process and no result.

    Raises IssuerError with the last 20 lines of Next.js' output.
    """
    if not _NEXT.is_file():
        raise IssuerError(f"Next.js is not installed: run `npm ci` in {WEB}")
    node = find_node()
    with _build_lock():
        sources = _digest()
        if _STAMP.is_file() and _STAMP.read_text() == sources:
            return
        _STAMP.unlink(missing_ok=True)
        say("building the web app (needed once per change of its sources)")
        with TemporaryFile() as output:
            process = subprocess.Popen(  # noqa: S603 - a program of this checkout, by its full path
                parent_watchdog.arguments([node, _NEXT, "build"], grace=5),
                cwd=WEB,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
            try:
                code = process.wait()
            finally:
                process.communicate()
            if code:
                output.seek(0)
                end = output.read().decode(errors="replace").splitlines()[-20:]
                raise IssuerError("the build of the web app failed:\n" + "\n".join(end))
        _STAMP.write_text(sources)


@contextmanager
def _build_lock() -> Iterator[None]:
    directory = os.open(WEB, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _digest() -> str:
    whole = hashlib.sha256(str(WEB).encode())
    for path in sorted(_sources()):
        whole.update(f"{path.relative_to(CONTRACT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _sources() -> Iterator[Path]:
    for folder, folders, names in os.walk(WEB):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        yield from (Path(folder, name) for name in names if name not in _NOT_SOURCES and not name.endswith(".md"))
    for pattern in _SHARED_SOURCES:
        yield from CONTRACT.glob(pattern)


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in ("HOME", "LANG", "PATH", "TMPDIR") if name in os.environ}
    return inherited | {"NEXT_TELEMETRY_DISABLED": "1", "NODE_ENV": "production"}
