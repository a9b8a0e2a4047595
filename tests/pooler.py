"""A pgbouncer of a test's own, in transaction mode: few connections to PostgreSQL, shared by all that are made to it."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

SHARED = 2  # connections to PostgreSQL
_PORT = 6432


@contextmanager
def pooler(url: str) -> Iterator[str]:
    """Between here and a database; its URL. As root it runs as whoever owns PostgreSQL's socket, for it must not be root."""
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
        owner = Path(str(target["host"])).stat() if str(target["host"]).startswith("/") else os.stat("/dev/null")
        as_root = os.geteuid() == 0
        if as_root:
            os.chown(folder, owner.st_uid, owner.st_gid)
        process = subprocess.Popen(
            ["pgbouncer", folder / "ini"],
            stderr=subprocess.PIPE,
            text=True,
            user=owner.st_uid if as_root else None,
            group=owner.st_gid if as_root else None,
            extra_groups=[] if as_root else None,
        )
        assert process.stderr is not None
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if "process up" in line:
                    break
            else:
                raise RuntimeError("".join(said))
            yield f"postgresql://{target['user']}@/pooled?host={quote(str(folder), safe='')}&port={_PORT}"
        finally:
            process.kill()
            process.communicate()
