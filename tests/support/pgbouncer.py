"""A pgbouncer in transaction mode: its clients share two connections to PostgreSQL."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

SHARED = 2  # connections to PostgreSQL
_PORT = 6432


@contextmanager
def pooler(url: str) -> Iterator[str]:
    """Start a pgbouncer for one database; yields its URL. As root, it runs as the owner of PostgreSQL's socket or as
    the user `nobody`."""
    target = {name: value for name, value in conninfo_to_dict(url).items() if value}
    with tempfile.TemporaryDirectory(prefix="pooler-") as name:
        folder = Path(name)
        settings = {
            "listen_addr": "",
            "listen_port": _PORT,
            "unix_socket_dir": folder,
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": SHARED,
            "max_client_conn": 200,
            "log_connections": 0,
            "log_disconnections": 0,
            "stats_users": target["user"],
        }
        lines = [f"{key} = {value}" for key, value in settings.items()]
        database = " ".join(f"{key}='{value}'" for key, value in target.items())
        (folder / "ini").write_text("\n".join(["[databases]", f"pooled = {database}", "[pgbouncer]", *lines, ""]))
        command: list[str | Path] = ["pgbouncer", folder / "ini"]
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            host = Path(str(target["host"]))
            owner = host.owner() if host.is_absolute() and host.owner() != "root" else "nobody"
            account = {"user": owner, "group": pwd.getpwnam(owner).pw_gid, "extra_groups": []}
            shutil.chown(folder, owner)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **account)
        assert process.stderr is not None
        try:
            log = []
            for line in process.stderr:
                log.append(line)
                if "process up" in line:
                    break
            else:
                raise RuntimeError("".join(log))
            yield f"postgresql://{target['user']}@/pooled?host={quote(str(folder), safe='')}&port={_PORT}"
        finally:
            process.kill()
            process.communicate()
