"""The guide for an existing Next.js app: its code compiles, and the API accepts the users of the app."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from secrets import token_urlsafe
from typing import NamedTuple

import pytest

from backend.auth.errors import Reason
from backend.dev.issuer import find_node
from backend.settings import Settings
from tests.contract.packages import CONTRACT, TSC, run
from tests.contract.serving import serving

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "connect-your-better-auth.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
FILES = re.findall(r"^```(diff|env|tsx?) (\S+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)

# The app before the guide: Better Auth as in its documentation, in the output of `create-next-app`.
APP = {
    "lib/auth.ts": """
        import { DatabaseSync } from "node:sqlite";
        import { betterAuth } from "better-auth";
        import { nextCookies } from "better-auth/next-js";

        export const auth = betterAuth({
          database: new DatabaseSync(":memory:"),
          emailAndPassword: { enabled: true },
          plugins: [nextCookies()],
        });
    """,
    "app/api/auth/[...all]/route.ts": """
        import { toNextJsHandler } from "better-auth/next-js";
        import { auth } from "@/lib/auth";

        export const { GET, POST } = toNextJsHandler(auth);
    """,
    "next-env.d.ts": '/// <reference types="next" />',
    "tsconfig.json": json.dumps(
        {
            "compilerOptions": {
                "target": "ES2017",
                "lib": ["dom", "dom.iterable", "esnext"],
                "module": "esnext",
                "moduleResolution": "bundler",
                "jsx": "react-jsx",
                "strict": True,
                "noEmit": True,
                "skipLibCheck": True,
                "esModuleInterop": True,
                "isolatedModules": True,
                "resolveJsonModule": True,
                "paths": {"@/*": ["./*"]},
            }
        }
    ),
}

MISTAKES = """
        import { api } from "./lib/api-browser";
        import { apiOfRequest } from "./lib/api-server";
        import { auth } from "./lib/auth";

        // @ts-expect-error no such member
        await api.POST("/api/v1/tasks", { body: { titel: "x" } });
        // @ts-expect-error no such path
        await (await apiOfRequest()).GET("/api/v1/taks");
        // @ts-expect-error not what the plugin is called
        auth.api.getJwt;
"""

# Serves the route with Node.js instead of Next.js, and prints the port.
SERVER = """
    import { createServer } from "node:http";
    import { registerHooks } from "node:module";
    import { getMigrations } from "better-auth/db/migration";
    import { toNodeHandler } from "better-auth/node";

    registerHooks({
      resolve: (name, context, next) => next(/^\\.\\/[a-z-]+$/.test(name) ? `${name}.ts` : name, context),
    });
    const server = createServer((request, response) => answer(request, response));
    await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
    const { port } = server.address();
    process.env.BETTER_AUTH_URL = process.env.BETTER_AUTH_URL.replace(/\\d+$/, port);
    const { auth } = await import("./lib/auth.ts");
    await (await getMigrations(auth.options)).runMigrations();
    const answer = toNodeHandler(auth);
    console.log(port);
    process.stdin.once("end", () => process.exit()).resume();
"""


def dedented(text: str) -> str:
    return re.sub(r"^ {8}", "", text.lstrip("\n"), flags=re.MULTILINE)


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a tar archive. The filters of `tarfile` came with Python 3.11.4; 3.12 warns without one."""
    with tarfile.open(archive) as members:
        for member in members:
            content = members.extractfile(member)
            if content is not None:
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / member.name).write_bytes(content.read())


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Path:
    """The app after the guide: files copied and changed as it says."""
    folder = tmp_path_factory.mktemp("app")
    for name, text in APP.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedented(text))
    for source, target in re.findall(r"^cp \.\./resource-server/(\S+) (\S+)$", "".join(COMMANDS), re.MULTILINE):
        shutil.copy(ROOT / source, folder / target)
    for kind, name, block in FILES:
        file = folder / name
        if kind == "diff":
            lines = block.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
            assert file.read_text().count(before) == 1, f"{name} does not contain the context of the diff:\n{before}"
            block = file.read_text().replace(before, after)
        file.parent.mkdir(exist_ok=True)
        file.write_text(block)
    modules = folder / "node_modules"
    modules.mkdir()
    found = {
        module.name: module for place in (CONTRACT, CONTRACT / "web") for module in (place / "node_modules").iterdir()
    }
    for name in found.keys() - {"@frontend-contract"}:
        (modules / name).symlink_to(found[name])
    (modules / "@frontend-contract").mkdir()
    unpack(package, folder / "unpacked")
    (folder / "unpacked" / "package").rename(modules / "@frontend-contract" / "client")
    return folder


def test_the_code_of_the_guide_compiles(app: Path) -> None:
    """Mistakes are reported, so the clients are typed in the app as well."""
    (app / "mistakes.ts").write_text(dedented(MISTAKES))
    run(find_node(), app, TSC, "-p", ".")


class Ports(NamedTuple):
    app: int
    api: int

    def substitute(self, text: str) -> str:
        """Replace the ports of the guide."""
        return text.replace("localhost:3000", f"localhost:{self.app}").replace(
            "localhost:8000", f"localhost:{self.api}"
        )


@pytest.fixture(scope="module")
def ports(app: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """Run the app's Better Auth and the API with the settings of the guide."""
    (app / "server.mjs").write_text(SERVER)
    (given,) = (block for _, name, block in FILES if name == ".env.local")
    with ExitStack() as stack:
        chosen = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        api = chosen.getsockname()[1]
        environment = dict(line.split("=", 1) for line in Ports(3000, api).substitute(given).splitlines())
        process = stack.enter_context(
            subprocess.Popen(
                [find_node(), "--experimental-strip-types", "--disable-warning=ExperimentalWarning", "server.mjs"],
                cwd=app,
                env={"PATH": os.environ["PATH"], "BETTER_AUTH_SECRET": token_urlsafe(32), **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(process.communicate)
        assert process.stdout
        ports = Ports(int(process.stdout.readline()), api)
        said = dict(re.findall(r"^echo (\w+)=(\S+) >> \.env$", ports.substitute("".join(COMMANDS)), re.MULTILINE))
        # `make dev` sets these.
        made = {"PUBLIC_URL": f"http://localhost:{api}", "DATABASE_URL": settings.database_url}
        chosen.close()
        stack.enter_context(serving(tmp_path_factory.mktemp("empty"), said | made, api))
        yield ports


def send(port: int, method: str, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, headers=headers, body="{}" if method == "POST" else None)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


@pytest.mark.needs("curl")
def test_the_api_accepts_users_of_the_app(ports: Ports, tmp_path: Path) -> None:
    (lines,) = (block for block in COMMANDS if "users/me" in block)
    script = f"set -euo pipefail\n{ports.substitute(lines)}\necho; echo $TOKEN; tail -1 cookies"
    said = subprocess.run(
        ["bash", "-c", script],  # noqa: S607
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    me, token, cookie = said.splitlines()
    assert json.loads(me)["name"] == "Ada"
    # The app's pages may call the API with the headers of the client.
    origin = ports.substitute("http://localhost:3000")
    asked = "authorization,content-type,idempotency-key,if-match,last-event-id"
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    status, headers, _ = send(ports.api, "OPTIONS", "/api/v1/tasks", Origin=origin, **wanted)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, origin)
    # A sign-out revokes the token at once.
    signed_in = {"Cookie": "=".join(cookie.split("\t")[-2:]), "Content-Type": "application/json", "Origin": origin}
    assert send(ports.app, "POST", "/api/auth/sign-out", **signed_in)[0] == 200
    status, _, problem = send(ports.api, "GET", "/api/v1/users/me", Authorization=f"Bearer {token}")
    assert (status, json.loads(problem)["detail"]) == (401, Reason.REVOKED.value)


def test_settings_and_errors_named_in_the_guide_exist() -> None:
    known = {name.upper() for name in Settings.model_fields}
    production = re.findall(r"^\| API \| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert len(production) > 3
    assert {*production, *re.findall(r"^echo (\w+)=", "".join(COMMANDS), re.MULTILINE)} <= known
    quoted = re.findall(r'^\| 401 "(.+?)" \|', GUIDE, re.MULTILINE)
    assert len(quoted) > 2
    assert set(quoted) <= {reason.value for reason in Reason}
    codes = [
        (status, code)
        for status, rest in re.findall(r"^\| (\d+) (`.+?) \|", GUIDE, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", rest)
    ]
    assert len(codes) > 2
    assert {f"| `{code}` | {status} |" for status, code in codes} <= set(
        re.findall(r"^\| `\w+` \| \d+ \|", ERRORS, re.MULTILINE)
    )
