"""Security events: verified, applied once and in order, and effective in every worker."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from backend.auth.encoding import decode_base64url
from backend.auth.testing import LocalIssuer, SigningKey
from backend.database import SYSTEM, Database
from backend.settings import Settings
from backend.users import lifecycle
from backend.users.security_events.schemas import EventType
from backend.web.event_quotas import EventQuotas
from tests.conftest import BASE, ISSUER, Api, caught_up, running
from tests.database.test_executor import raw

ME = "/api/v1/users/me"
PATH = "/api/v1/security-events"
KIND = "application/secevent+jwt"
DISABLED, ENABLED, PURGED = EventType.account_disabled, EventType.account_enabled, EventType.account_purged
REVOKED = EventType.session_revoked


@pytest.fixture(autouse=True)
def quotas(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a quota of rejected tokens of its own."""
    monkeypatch.setattr(api.state["security_events"], "quotas", EventQuotas())


def roles(role: object) -> dict[str, Any]:
    return {EventType.token_claims_change: {"claims": {"role": role}}}


def merged(into: str, **members: Any) -> dict[str, Any]:
    return {EventType.account_merged: {"into": {"format": "iss_sub", "iss": ISSUER, "sub": into} | members}}


async def send(api: Api, token: str | bytes, kind: str = KIND) -> httpx.Response:
    return await api.http.post(PATH, content=token, headers={"Content-Type": kind})


async def deliver(api: Api, sub: str, *events: str | Mapping[str, Any], **options: Any) -> None:
    """Send a valid event."""
    response = await send(api, api.issuer.security_event(sub, *events, **options))
    assert (response.status_code, response.content) == (202, b""), response.text


async def audit_entries(api: Api, subject: str) -> list[dict[str, Any]]:
    """The audit entries of a subject, oldest first."""
    statement = raw("SELECT * FROM audit_log WHERE subject = :subject ORDER BY id")
    return await Database(api.state["pool"], SYSTEM).rows(statement, subject=subject)


async def test_a_ban_refuses_requests_until_it_ends(api: Api) -> None:
    ada = api.person()
    assert (await ada.get(ME)).status_code == 200
    await deliver(api, ada.subject, DISABLED)
    refused = await ada.get(ME)
    assert (refused.status_code, refused.json()["code"]) == (403, "account_suspended")
    await deliver(api, ada.subject, ENABLED)
    assert (await ada.get(ME)).status_code == 200


async def test_a_sign_out_revokes_earlier_tokens(api: Api) -> None:
    now = time.time()
    ada = api.person(iat=int(now) - 20, exp=int(now) + 600)
    assert (await ada.get(ME)).status_code == 200
    await deliver(api, ada.subject, REVOKED, toe=now - 10)
    refused = await ada.get(ME)
    assert (refused.status_code, refused.json()["code"]) == (401, "invalid_token")
    fresh = {"Authorization": f"Bearer {ada.token(iat=int(now) - 9)}"}
    assert (await ada.get(ME, headers=fresh)).status_code == 200
    await deliver(api, ada.subject, REVOKED, toe=now - 15)
    assert (await ada.get(ME, headers=fresh)).status_code == 200
    assert (await ada.get(ME)).status_code == 401


async def test_a_deletion_purges_the_account(api: Api) -> None:
    ada = api.person()
    await ada.task()
    await deliver(api, ada.subject, PURGED)
    refused = await ada.get(ME)
    assert (refused.status_code, refused.json()["code"]) == (403, "account_purged")
    await deliver(api, ada.subject, ENABLED, roles("admin"))
    assert (await ada.get(ME)).json()["code"] == "account_purged"


async def test_roles_are_those_of_the_event_and_older_claims_do_not_restore_them(api: Api) -> None:
    now = time.time()
    ada = api.person(role="admin,user", iat=int(now) - 60, exp=int(now) + 600)
    assert (await ada.get(ME)).json()["roles"] == ["admin", "user"]
    await deliver(api, ada.subject, roles(" user ,"), toe=now - 30.5)
    assert (await ada.get(ME)).json()["roles"] == ["user"]
    for iat, expected in {int(now) - 32: ["user"], int(now) - 20: ["admin"]}.items():
        token = ada.token(role="admin", iat=iat)
        assert (await ada.get(ME, headers={"Authorization": f"Bearer {token}"})).json()["roles"] == expected
    await deliver(api, ada.subject, roles(None))
    assert (await ada.get(ME)).json()["roles"] == []


@pytest.mark.parametrize(
    ("role", "expected"),
    [(["user"], ["user"]), (["admin", "user"], ["admin", "user"]), (["admin", 1], []), (5, []), ({"admin": True}, [])],
    ids=str,
)
async def test_a_role_in_any_form_replaces_the_old_one(api: Api, role: object, expected: list[str]) -> None:
    ada = api.person(role="admin")
    assert (await ada.get(ME)).json()["roles"] == ["admin"]
    await deliver(api, ada.subject, roles(role))
    assert (await ada.get(ME)).json()["roles"] == expected


async def test_changes_of_other_claims_are_ignored(api: Api) -> None:
    ada = api.person(role="admin")
    await deliver(api, ada.subject, {EventType.token_claims_change: {"claims": {"plan": "pro"}}})
    assert (await ada.get(ME)).json()["roles"] == ["admin"]
    assert [entry["details"]["done"] for entry in await audit_entries(api, ada.subject)] == [False]


async def test_a_merge_event_moves_the_data_of_an_anonymous_account(api: Api) -> None:
    guest, ada = api.person(isAnonymous=True), api.person()
    task = await guest.task("kept")
    await deliver(api, guest.subject, merged(ada.subject))
    assert (await ada.get(f"/api/v1/tasks/{task['id']}")).json()["title"] == "kept"
    assert (await guest.get(ME)).json()["code"] == "account_purged"
    await deliver(api, guest.subject, merged(ada.subject))
    assert len((await ada.get("/api/v1/tasks")).json()["items"]) == 1


async def test_events_before_the_first_request_apply(api: Api) -> None:
    now = time.time()
    banned, purged, demoted = (api.person(role="admin", iat=int(now) - 60, exp=int(now) + 600) for _ in range(3))
    await deliver(api, banned.subject, DISABLED)
    await deliver(api, purged.subject, PURGED)
    await deliver(api, demoted.subject, roles("user"), toe=now - 1)
    assert (await banned.get(ME)).json()["code"] == "account_suspended"
    assert (await purged.get(ME)).json()["code"] == "account_purged"
    assert (await demoted.get(ME)).json()["roles"] == ["user"]


async def test_another_worker_refuses_at_once(api: Api, settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings, issuer) as other:
        ada = api.person()
        elsewhere = other.person(sub=ada.subject)
        assert (await elsewhere.get(ME)).status_code == 200
        await deliver(api, ada.subject, DISABLED)
        await caught_up(other.state["users"])
        assert (await elsewhere.get(ME)).json()["code"] == "account_suspended"


async def test_a_token_is_applied_once(api: Api) -> None:
    now = time.time()
    ada = api.person()
    id = uuid4().hex
    await deliver(api, ada.subject, DISABLED, jti=id, toe=now - 3)
    await deliver(api, ada.subject, ENABLED, toe=now - 2)
    # A later time would be applied if the id had not been stored.
    await deliver(api, ada.subject, DISABLED, jti=id, toe=now - 1, iss=BASE)
    assert (await ada.get(ME)).status_code == 200
    assert len(await audit_entries(api, ada.subject)) == 2


async def test_concurrent_deliveries_of_a_token_apply_it_once(api: Api) -> None:
    ada = api.person()
    await asyncio.gather(*(deliver(api, ada.subject, DISABLED, jti=f"once-{ada.subject}") for _ in range(30)))
    assert len(await audit_entries(api, ada.subject)) == 1
    assert (await ada.get(ME)).status_code == 403


async def test_events_are_ordered_by_their_own_time(api: Api) -> None:
    now = time.time()
    ada = api.person(iat=int(now) - 60, exp=int(now) + 600)
    await deliver(api, ada.subject, ENABLED, roles("user"), toe=now - 1.25)
    await deliver(api, ada.subject, DISABLED, roles("admin"), toe=now - 1.5)
    assert (await ada.get(ME)).json()["roles"] == ["user"]
    assert [entry["details"]["done"] for entry in await audit_entries(api, ada.subject)] == [True, True, False, False]
    # The default is `iat`.
    await deliver(api, ada.subject, DISABLED, iat=int(now) - 100, omit=["toe"])
    assert (await ada.get(ME)).status_code == 200


async def test_an_erasure_keeps_the_order_of_events(api: Api) -> None:
    now = time.time()
    ada = api.person()
    await deliver(api, ada.subject, ENABLED, toe=now - 5)
    assert (await ada.delete(ME)).status_code == 204
    await deliver(api, ada.subject, DISABLED, toe=now - 10)
    assert (await ada.get(ME)).status_code == 200
    await deliver(api, ada.subject, DISABLED, toe=now - 1)
    assert (await ada.get(ME)).json()["code"] == "account_suspended"


async def test_the_events_of_a_token_are_applied_atomically(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    ada = api.person(role="admin", iat=int(now) - 60, exp=int(now) + 600)
    assert (await ada.get(ME)).status_code == 200
    token = api.issuer.security_event(ada.subject, roles("user"), DISABLED, toe=now)

    async def fail(*_: object) -> bool:
        raise psycopg.OperationalError

    with monkeypatch.context() as patched:
        patched.setattr(lifecycle, "set_banned", fail)
        response = await send(api, token)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert (await ada.get(ME)).json()["roles"] == ["admin"]
    assert (await send(api, token)).status_code == 202
    assert (await ada.get(ME)).status_code == 403
    assert [entry["action"] for entry in await audit_entries(api, ada.subject)] == [
        "token-claims-change",
        "account-disabled",
    ]


async def test_an_unknown_event_only_has_an_audit_entry(api: Api) -> None:
    ada = api.person()
    await deliver(api, ada.subject, "https://schemas.openid.net/secevent/caep/event-type/device-compliance-change")
    assert (await ada.get(ME)).status_code == 200
    (entry,) = await audit_entries(api, ada.subject)
    assert (entry["source"], entry["action"], entry["details"]["done"]) == ("event", "unknown-event", False)
    assert entry["details"]["event"].endswith("device-compliance-change")


async def test_events_have_audit_entries(api: Api) -> None:
    ada = api.person()
    response = await api.http.post(
        PATH,
        content=api.issuer.security_event(ada.subject, DISABLED, jti="an-id", toe=1700000000.125),
        headers={"Content-Type": KIND, "X-Request-ID": "request-1"},
    )
    assert response.status_code == 202
    (entry,) = await audit_entries(api, ada.subject)
    assert (entry["action"], entry["actor"], entry["request_id"]) == ("account-disabled", None, "request-1")
    assert entry["details"] == {"jti": "an-id", "toe": "2023-11-14T22:13:20.125000+00:00", "done": True}


Forge = Callable[[LocalIssuer], str | bytes]


class Now(float):
    """A time, in seconds relative to the creation of the token."""


def event(*events: str | Mapping[str, Any], **options: Any) -> Forge:
    def forge(issuer: LocalIssuer) -> str:
        claims: dict[str, Any] = {
            name: issuer.clock() + value if isinstance(value, Now) else value for name, value in options.items()
        }
        return issuer.security_event("user1", *(events or [DISABLED]), **claims)

    return forge


def raw_member(name: str, text: str) -> Forge:
    """A token with this JSON text as the value of a member."""

    def forge(issuer: LocalIssuer) -> str:
        claims: dict[str, Any] = {name: "$"}
        token = issuer.security_event("user1", DISABLED, **claims)
        payload = decode_base64url(token.split(".")[1]).decode().replace('"$"', text)
        return issuer.sign({"alg": issuer.key.alg, "kid": issuer.key.kid, "typ": "secevent+jwt"}, payload.encode())

    return forge


def subject(**members: Any) -> dict[str, Any]:
    return {"format": "iss_sub", "iss": ISSUER, "sub": "user1"} | members


UNPUBLISHED = SigningKey.generate("EdDSA", "unpublished")

INVALID: dict[str, dict[str, Forge]] = {
    "invalid_request": {
        "empty": lambda _: b"",
        "not ASCII": lambda _: b"\xff\x00",
        "two segments": lambda _: b"a.b",
        "JSON": lambda _: '{"iss": "x"}',
        "trailing newline": lambda issuer: issuer.security_event("user1", DISABLED) + "\n",
        "session token": lambda issuer: issuer.token(),
        "access token": lambda issuer: issuer.access_token(),
        "typ of a logout token": event(header={"typ": "logout+jwt"}),
        "typ with application/": event(header={"typ": "application/secevent+jwt"}),
        "no typ": event(header={"typ": None}),
        "crit": event(header={"crit": ["exp"]}),
        "iss is an array": event(iss=[ISSUER]),
        "no iss": event(omit=["iss"]),
        "no aud": event(omit=["aud"]),
        "no iat": event(omit=["iat"]),
        "iat is a string": event(iat="1700000000"),
        "iat is a boolean": event(iat=True),
        "iat is NaN": raw_member("iat", "NaN"),
        "iat is infinite": raw_member("iat", "1e400"),
        "toe has 400 digits": raw_member("toe", "1" * 400),
        "toe is negative": event(toe=-1),
        "toe is in milliseconds": event(toe=1e12),
        "no jti": event(omit=["jti"]),
        "jti is empty": event(jti=""),
        "jti is too long": event(jti="x" * 256),
        "jti has NUL": event(jti="a\0b"),
        "jti is a number": event(jti=7),
        "sub in place of sub_id": event(omit=["sub_id"], sub="user1"),
        "sub_id is a string": event(sub_id="user1"),
        "sub_id of another format": event(sub_id=subject(format="email")),
        "subject is empty": event(sub_id=subject(sub="")),
        "subject is blank": event(sub_id=subject(sub="  ")),
        "subject is too long": event(sub_id=subject(sub="x" * 256)),
        "subject has a lone surrogate": event(sub_id=subject(sub="\ud800")),
        "no events": event(omit=["events"]),
        "events is empty": event(events={}),
        "events is an array": event(events=[DISABLED]),
        "event is a boolean": event({DISABLED: True}),
        "event type has NUL": event({"urn:\0": {}}),
        "change without claims": event({EventType.token_claims_change: {}}),
        "claims is an array": event({EventType.token_claims_change: {"claims": ["role"]}}),
        "merge without a target": event({EventType.account_merged: {}}),
        "merge into itself": event(merged("user1")),
    },
    "invalid_key": {
        "alg none": event(header={"alg": "none"}),
        "alg HS256": event(header={"alg": "HS256"}),
        "kid is a number": event(header={"kid": 1}),
        "unknown kid": event(header={"kid": "unknown"}),
    },
    "authentication_failed": {
        "alg of another key": event(header={"alg": "ES256"}),
        "changed signature": lambda issuer: issuer.security_event("user1", DISABLED)[:-4] + "AAAA",
        "signed by another key": lambda issuer: issuer.security_event(
            "user1", DISABLED, key=UNPUBLISHED, header={"kid": issuer.key.kid}
        ),
    },
    "invalid_issuer": {"another issuer": event(iss="https://elsewhere.example")},
    "invalid_audience": {
        "audience of access tokens": event(audience="http://localhost:8000"),
        "aud is empty": event(aud=[]),
    },
    "access_denied": {
        "subject of another issuer": event(sub_id=subject(iss="https://elsewhere.example")),
        "merge into another issuer": event(merged("user2", iss="https://elsewhere.example")),
    },
}


def forbid_database(patch: pytest.MonkeyPatch) -> None:
    """Let a test fail if it uses the database."""
    for method in "rows", "transact":
        patch.setattr(Database, method, lambda *_, **__: pytest.fail("the database was used"))


@pytest.mark.parametrize(
    ("err", "forge"),
    [pytest.param(err, forge, id=name) for err, tokens in INVALID.items() for name, forge in tokens.items()],
)
async def test_invalid_tokens_are_rejected_without_the_database(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, err: str, forge: Forge
) -> None:
    """The log contains no part of the token."""
    caplog.set_level(logging.DEBUG)
    forbid_database(monkeypatch)
    token = forge(api.issuer)
    while (response := await send(api, token)).status_code == 503:
        # The budget of fetches for unknown keys is spent; the response asks for a retry.
        assert err in {"invalid_key", "authentication_failed"}
        monkeypatch.setattr(api.state["keys"]._policy, "_budget", 1)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
    assert response.headers["content-language"] == "en"
    error = response.json()
    assert list(error) == ["err", "description"]
    assert error["err"] == err
    text = token.decode("latin-1") if isinstance(token, bytes) else token
    for part in text.split("."):
        assert len(part) < 8 or not any(part in f"{record.getMessage()}{record.__dict__}" for record in caplog.records)


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(event(iss=BASE), id="other name of the issuer"),
        pytest.param(
            event(aud=["http://other.example", "http://localhost:8000/api/v1/security-events"]), id="two audiences"
        ),
        pytest.param(event(header={"typ": "SecEvent+JWT"}), id="case of typ"),
        pytest.param(event(header={"jku": "http://127.0.0.1:9/keys"}), id="jku is ignored"),
        pytest.param(event(sub_id=subject(iss=BASE)), id="other name of the subject's issuer"),
        pytest.param(event(exp=Now(600), nbf=Now(-1)), id="exp and nbf"),
        pytest.param(event(iat=Now(-290.5)), id="fraction of a second"),
        pytest.param(event(toe=0), id="toe in 1970"),
        pytest.param(event(omit=["toe"]), id="no toe"),
        pytest.param(event(sub="other", extra={"deep": [1]}), id="other claims"),
        pytest.param(event({EventType.account_disabled: {"reason": "hijacking"}}), id="members of the event"),
    ],
)
async def test_valid_tokens_are_accepted(api: Api, forge: Forge) -> None:
    assert (await send(api, forge(api.issuer))).status_code == 202


@pytest.mark.parametrize(
    ("claim", "seconds", "status"),
    [
        ("iat", -300, 202),
        ("iat", -301, 400),
        ("iat", 300, 202),
        ("iat", 301, 400),
        ("toe", 5, 202),
        ("toe", 5.5, 400),
        ("nbf", 5, 202),
        ("nbf", 6, 400),
        ("exp", -4, 202),
        ("exp", -5, 400),
    ],
)
async def test_times_may_differ_from_the_clock_up_to_a_limit(
    api: Api, monkeypatch: pytest.MonkeyPatch, claim: str, seconds: float, status: int
) -> None:
    now = int(time.time())
    monkeypatch.setattr(api.state["security_events"]._verifier, "clock", lambda: now)
    claims: dict[str, Any] = {"iat": now, "toe": now} | {claim: now + seconds}
    assert (await send(api, api.issuer.security_event("user1", ENABLED, **claims))).status_code == status


async def test_only_security_event_tokens_of_a_bounded_size_are_read(api: Api) -> None:
    # Whole seconds keep the length of the payload constant, on which the validity of the appended Base64 depends.
    token = api.issuer.security_event("user1", DISABLED, toe=int(api.issuer.clock()))
    for kind in "application/json", "application/jwt", "text/plain", "":
        response = await send(api, token, kind)
        assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert (await send(api, token, f"{KIND.upper()}; charset=utf-8")).status_code == 202
    short, long = (token.ljust(size, "A") for size in (16 * 1024, 16 * 1024 + 1))
    assert (await send(api, short)).json()["err"] == "authentication_failed"
    response = await send(api, long)
    assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    assert (await api.http.get(PATH)).status_code == 405


async def test_a_flood_of_forged_events_causes_few_fetches_and_no_statements(
    settings: Settings, issuer: LocalIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(settings, issuer) as api:
        ada = api.person()
        assert (await ada.get(ME)).status_code == 200
        before = sum(api.state["keys"].status().fetches.values())
        flood = [issuer.security_event("u", DISABLED, key=UNPUBLISHED, header={"kid": f"kid{n}"}) for n in range(100)]
        flood += [issuer.security_event("u", DISABLED, key=UNPUBLISHED, header={"kid": issuer.key.kid})] * 100
        with monkeypatch.context() as patched:
            forbid_database(patched)
            responses = await asyncio.gather(*(send(api, token) for token in flood))
        assert {response.status_code for response in responses} <= {400, 429, 503}
        assert all("retry-after" in response.headers for response in responses if response.status_code == 503)
        assert sum(api.state["keys"].status().fetches.values()) - before <= 2
        await deliver(api, ada.subject, DISABLED)
        assert (await ada.get(ME)).status_code == 403


async def test_without_keys_the_response_asks_for_a_retry(settings: Settings, issuer: LocalIssuer) -> None:
    config = settings.model_copy(update={"better_auth_jwks_url": "http://127.0.0.1:9/jwks"})
    async with running(config, issuer) as api:
        response = await send(api, issuer.security_event("user1", DISABLED))
        assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
        assert "retry-after" in response.headers


async def test_the_audience_is_a_setting(settings: Settings, issuer: LocalIssuer) -> None:
    async with running(settings.model_copy(update={"security_events_audience": "tasks"}), issuer) as api:
        await deliver(api, "user1", ENABLED, audience="tasks")
        response = await send(api, issuer.security_event("user1", ENABLED))
        assert response.json()["err"] == "invalid_audience"
