"""The embedded PostgreSQL starts in any directory, keeps committed data and ends with its parent process."""

import fcntl
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backend.dev import postgres_binaries
from backend.dev.postgres import EmbeddedPostgres, EmbeddedPostgresError
from tests.dev.conftest import copy_data
from tests.dev.processes import await_end, family

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run PostgreSQL as another user")


@pytest.fixture
def data(place: Path, initialized_data: Path) -> Path:
    """The data directory of an earlier run."""
    copy_data(initialized_data, place / "data")
    return place / "data"


def start(data_dir: Path | None, **options: Any) -> EmbeddedPostgres:
    return EmbeddedPostgres(data_dir, **{"durable": False, **options})


def ask(server: EmbeddedPostgres, statement: str) -> Any:
    with psycopg.connect(server.url) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return row and row[0]


def insert_note(server: EmbeddedPostgres, text: str) -> None:
    with psycopg.connect(server.url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS note (text text)")
        connection.execute("INSERT INTO note VALUES (%s)", [text])


def notes(server: EmbeddedPostgres) -> Any:
    return ask(server, "SELECT array_agg(text ORDER BY text) FROM note")


def test_a_temporary_server_runs_postgresql_18_and_deletes_its_files() -> None:
    with start(None, max_connections=7, settings={"work_mem": "5MB"}) as server:
        assert ask(server, "SHOW server_version").startswith("18.")
        assert ask(server, "SELECT casefold('Straße ÀÉ')") == "strasse àé"
        assert (ask(server, "SHOW max_connections"), ask(server, "SHOW work_mem")) == ("7", "5MB")
        home = Path(ask(server, "SHOW data_directory")).parent
        processes = family(server.pid)
        assert len(processes) > 1
        assert ask(server, "SHOW fsync") == "off"
        assert ask(server, "SHOW listen_addresses") == ""
    assert not home.exists()
    assert await_end(processes, timeout=0) == []
    with pytest.raises(EmbeddedPostgresError, match="not started"):
        _ = server.url


def test_data_and_url_survive_a_restart(place: Path) -> None:
    data_dir = place / "data"
    with start(data_dir, durable=True) as server:
        url = server.url
        assert ask(server, "SHOW fsync") == "on"
        insert_note(server, "kept")
    with start(data_dir) as server:
        assert server.url == url
        assert notes(server) == ["kept"]
    server.close()


def test_committed_data_survive_a_crash(data: Path) -> None:
    with start(data, durable=True) as server:
        insert_note(server, "kept")
        server.kill()
        server.start()
        assert notes(server) == ["kept"]


def test_only_the_owner_can_open_the_socket(data: Path) -> None:
    with start(data) as server:
        directory = Path(ask(server, "SHOW unix_socket_directories").strip('"'))
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "name",
    ["a 'quoted', \"path\" 100% ünïcode $HOME #?&", "long-" + "x" * 120],
    ids=["special characters", "long"],
)
def test_unusual_paths_work(place: Path, name: str) -> None:
    with start(place / name / "data") as server:
        insert_note(server, "here")
        assert (place / name / "data" / "cluster" / "PG_VERSION").exists()
        where = psycopg.conninfo.conninfo_to_dict(server.url)["host"]
        assert isinstance(where, str)
        assert len(f"{where}/.s.PGSQL.5432".encode()) < 104
    assert Path(where).exists() == where.startswith(str(place)), (
        "a socket outside the data directory is deleted with the server"
    )
    with start(place / name / "data") as server:
        assert notes(server) == ["here"]


def test_a_second_start_on_the_same_data_is_refused(data: Path) -> None:
    with start(data) as server:
        with pytest.raises(
            EmbeddedPostgresError, match=rf"in use by process {os.getpid()}: .*another directory$"
        ) as caught:
            start(data).start()
        assert str(data) in str(caught.value)
        assert ask(server, "SELECT 1") == 1


def start_in_child(data_dir: Path) -> tuple["subprocess.Popen[str]", list[Any]]:
    """Start a server in a child process; return that process and all processes of its tree."""
    script = f"""
from pathlib import Path
from backend.dev.postgres import EmbeddedPostgres
with EmbeddedPostgres(Path({str(data_dir)!r})) as server:
    print(server.url, flush=True)
    input()
"""
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline().startswith("postgresql://")
    return process, family(process.pid)


def test_it_ends_with_its_parent_even_after_kill_9(data: Path) -> None:
    process, processes = start_in_child(data)
    assert len(processes) > 4
    process.kill()
    assert await_end(processes) == []
    process.communicate()
    assert "database system is shut down" in (data / "log").read_text()
    with start(data) as server:
        assert ask(server, "SELECT 1") == 1


def test_an_orphaned_server_of_an_earlier_run_is_stopped_first(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    process, processes = start_in_child(data)
    watchdog = next(each for each in processes if any("parent_watchdog.py" in word for word in each.cmdline()))
    orphans = family(watchdog.pid)[1:]
    watchdog.kill()
    process.kill()
    process.communicate()
    assert all(orphan.is_running() for orphan in orphans)
    with start(data) as server:
        assert await_end(orphans, timeout=0) == []
        assert ask(server, "SELECT 1") == 1
    assert "earlier run" in caplog.text


def test_an_interrupted_initdb_is_repeated(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str | Path], _: Any) -> None:
        if Path(command[0]).name == "initdb":
            Path(command[2]).mkdir()
            Path(command[2], "PG_VERSION").write_text("18\n")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(postgres_binaries, "execute", interrupted)
        patch.setattr(postgres_binaries, "can_run", lambda *_: True)
        patch.setattr(postgres_binaries, "can_enter", lambda *_: True)
        with pytest.raises(KeyboardInterrupt):
            start(place / "data").start()
    assert (place / "data" / "cluster.unfinished" / "PG_VERSION").exists()
    with start(place / "data") as server:
        assert ask(server, "SELECT 1") == 1
    assert not (place / "data" / "cluster.unfinished").exists()


def test_a_postmaster_pid_that_another_program_has_taken_is_ignored(data: Path) -> None:
    cluster = data / "cluster"
    owner = cluster.stat()
    identity: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid} if os.geteuid() == 0 else {}
    other = subprocess.Popen(["/bin/sleep", "600"], **identity)
    try:
        pid_file = cluster / "postmaster.pid"
        pid_file.write_text(f"{other.pid}\n{cluster}\n1700000000\n5432\n{cluster}\n\n  1 1\nready\n")
        os.chown(pid_file, owner.st_uid, owner.st_gid)
        with start(data) as server:
            assert ask(server, "SELECT 1") == 1
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_data_of_another_version_are_left_alone(place: Path) -> None:
    cluster = place / "data" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedPostgresError, match=r"written by PostgreSQL 17, not 18: .*DATABASE_URL"):
        start(place / "data").start()
    assert (cluster / "PG_VERSION").read_text() == "17\n"


def test_the_error_of_a_failed_start_is_the_servers_own(data: Path) -> None:
    server = start(data, settings={"shared_buffers": "plenty"})
    with pytest.raises(EmbeddedPostgresError, match="shared_buffers") as caught:
        server.start()
    assert "\n" not in str(caught.value)
    with start(data) as server:
        assert ask(server, "SELECT 1") == 1


def test_a_start_that_times_out_leaves_no_server(data: Path) -> None:
    server = start(data, start_timeout=0)
    with pytest.raises(EmbeddedPostgresError, match=r"not ready in 0 s"):
        server.start()
    with (data / "server.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_platform_without_binaries_gets_a_remedy(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EmbeddedPostgresError, match=r"set DATABASE_URL$"):
        start(place / "data").start()


def test_binaries_that_cannot_run_get_their_own_error(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(postgres_binaries, "can_run", lambda *_: False)
    with pytest.raises(EmbeddedPostgresError, match=r"does not run on this system: set DATABASE_URL$"):
        start(place / "data").start()


def test_a_directory_that_cannot_be_created_is_named(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(EmbeddedPostgresError, match="cannot create"):
        start(place / "file" / "data").start()


@needs_root
def test_root_runs_it_as_the_owner_of_the_directory_or_as_nobody(place: Path, data: Path) -> None:
    daemon = pwd.getpwnam("daemon")
    os.chown(place, daemon.pw_uid, daemon.pw_gid)
    with start(place / "of" / "daemon") as server:
        assert family(server.pid)[0].username() == "daemon"
    with start(data) as server:
        assert family(server.pid)[0].username() == "nobody", "the owner of the existing data"
    os.chown(place, 54321, 54321)
    assert postgres_binaries.account_for(place / "new") == postgres_binaries.account_for(Path("/new"))


def test_a_uid_without_a_user_name_is_refused(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(EmbeddedPostgresError, match=r"uid 54321, which has no user name: set DATABASE_URL$"):
        start(place / "data").start()


@needs_root
def test_root_changes_no_directorys_permissions(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postgres_binaries, "SYSTEM_DIRECTORY", place / "system")
    private = place / "private"
    private.mkdir(mode=0o700)
    caplog.set_level(logging.WARNING)
    with start(private / "project" / "data") as server:
        insert_note(server, "kept")
        assert ask(server, "SHOW data_directory").startswith(str(place / "system"))
        assert family(server.pid)[0].username() == "nobody"
    with start(private / "project" / "data") as server:
        assert notes(server) == ["kept"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert len(re.findall(f"storing its data in {place}/system", caplog.text)) == 1


@needs_root
def test_root_copies_binaries_that_the_other_user_cannot_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = postgres_binaries.installed()
    package = binaries.parents[1]
    private = place / "private"
    private.mkdir(mode=0o700)
    for entry in (package, package.with_name(f"{package.name}.libs")):
        if entry.exists():
            (private / entry.name).symlink_to(entry)
    monkeypatch.setattr(postgres_binaries, "installed", lambda: private / binaries.relative_to(package.parent))
    monkeypatch.setattr(postgres_binaries, "SYSTEM_DIRECTORY", place / "system")
    for _ in range(2):
        with start(place / "data") as server:
            assert family(server.pid)[0].exe().startswith(str(place / "system"))
    assert len(list((place / "system").iterdir())) == 1
    shutil.rmtree(place / "system")


def test_wait_returns_when_another_process_stops_the_server(data: Path) -> None:
    with start(data) as server:
        os.kill(server.pid, signal.SIGINT)
        assert server.wait() == 0
