"""The principal that is read from the claims of Better Auth and its plugins."""

import copy
import json
import pickle
from typing import Any

import pytest

from backend.auth import InvalidToken, Principal, Reason
from backend.auth.principal import without_unstorable

BASE = {"sub": "user1", "iss": "https://auth.example.com", "iat": 1_000, "exp": 1_900.5}


def read(*, is_access_token: bool = False, **claims: Any) -> Principal:
    return Principal.from_claims({**BASE, **claims}, is_access_token=is_access_token)


def test_a_principal_of_the_required_claims_has_defaults() -> None:
    principal = read()
    assert (principal.subject, principal.issuer) == ("user1", "https://auth.example.com")
    assert (principal.issued_at, principal.expires_at) == (1_000.0, 1_900.5)
    assert isinstance(principal.issued_at, float)
    assert principal.scopes is None
    assert principal.client_id is None
    assert principal.session_id is None
    assert principal.profile == {}
    assert (principal.email, principal.email_verified, principal.name, principal.image) == (None, False, None, None)
    assert principal.roles is None
    assert not principal.is_anonymous
    assert principal.impersonated_by is None
    assert not principal.is_banned(0)
    assert not principal.is_machine
    assert principal.claims == BASE


def test_better_auths_default_payload_is_read() -> None:
    principal = read(
        name="Ada", email="ada@example.com", emailVerified=True, image=None, role="admin,user", banned=False
    )
    assert principal.profile == {"name": "Ada", "email": "ada@example.com", "email_verified": True, "image": None}
    assert (principal.email, principal.email_verified, principal.name) == ("ada@example.com", True, "Ada")
    assert principal.roles == ("admin", "user")


@pytest.mark.parametrize(
    ("claims", "profile"),
    [
        ({}, {}),
        ({"name": None}, {"name": None}),
        ({"name": ""}, {"name": ""}),
        ({"name": 5, "email": ["a"], "image": {}}, {}),
        ({"emailVerified": False}, {"email_verified": False}),
        ({"emailVerified": "true"}, {}),
        ({"emailVerified": None}, {}),
        ({"emailVerified": 1}, {}),
    ],
)
def test_an_absent_profile_claim_differs_from_null(claims: dict[str, Any], profile: dict[str, Any]) -> None:
    assert read(**claims).profile == profile


@pytest.mark.parametrize(
    ("claims", "roles"),
    [
        ({}, None),
        ({"role": None}, ()),
        ({"role": ""}, ()),
        ({"role": " , ,"}, ()),
        ({"role": "admin"}, ("admin",)),
        ({"role": "admin,user"}, ("admin", "user")),
        ({"role": " Admin , user "}, ("Admin", "user")),
        ({"role": ["admin"]}, ("admin",)),
        ({"role": [" Admin ", "user", ""]}, ("Admin", "user")),
        ({"role": []}, ()),
        ({"role": ["user,admin"]}, ("user,admin",)),
        ({"role": ["admin", 1]}, ()),
        ({"role": ["admin", None]}, ()),
        ({"role": 1}, ()),
        ({"role": {"admin": True}}, ()),
    ],
)
def test_roles_are_read_from_session_jwts_only(claims: dict[str, Any], roles: tuple[str, ...] | None) -> None:
    assert read(**claims).roles == roles
    assert read(**claims, is_access_token=True).roles is None
    assert read(**claims, key="key1").roles is None


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [
        (None, frozenset()),
        ("", frozenset()),
        ("tasks:read", frozenset({"tasks:read"})),
        ("tasks:read  tasks:write", frozenset({"tasks:read", "tasks:write"})),
        (["tasks:read"], frozenset()),
        (1, frozenset()),
    ],
)
def test_only_access_tokens_and_api_keys_have_scopes(scope: Any, scopes: frozenset[str]) -> None:
    assert read(scope=scope, is_access_token=True).scopes == scopes
    assert read(scope=scope).scopes is None
    keys: tuple[object, ...] = ("key1", "", None, 5, False, [], {})
    for key in keys:
        assert read(scope=scope, key=key).scopes == scopes


@pytest.mark.parametrize(
    ("claims", "banned"),
    [
        ({}, False),
        ({"banned": None}, False),
        ({"banned": False}, False),
        ({"banned": 0}, False),
        ({"banned": False, "banExpires": None}, False),
        ({"banned": True}, True),
        ({"banned": 1}, True),
        ({"banned": "yes"}, True),
        ({"banned": True, "banExpires": None}, True),
        ({"banned": True, "banExpires": "2027-01-15T08:00:01.000Z"}, True),
        ({"banned": True, "banExpires": "2027-01-15T08:00:00.000Z"}, False),
        ({"banned": True, "banExpires": "2027-01-15T09:00:00+01:00"}, False),
        ({"banned": True, "banExpires": "2027-01-15T09:00:01+01:00"}, True),
        ({"banned": True, "banExpires": 1_800_000_001}, True),
        ({"banned": True, "banExpires": 1_800_000_000}, False),
        ({"banned": True, "banExpires": 1_799_999_999.5}, False),
        ({"banned": True, "banExpires": 1_800_000_001_000}, True),
        ({"banned": True, "banExpires": 1_799_999_999_999}, False),
        ({"banned": True, "banExpires": 0}, False),
        ({"banned": True, "banExpires": "2027-01-14T08:00:00"}, True),
        ({"banned": True, "banExpires": "yesterday"}, True),
        ({"banned": True, "banExpires": ""}, True),
        ({"banned": True, "banExpires": "0000-00-00T00:00:00Z"}, True),
        ({"banned": True, "banExpires": False}, True),
        ({"banned": True, "banExpires": []}, True),
        ({"banned": True, "banExpires": -1e300}, True),
        ({"banned": True, "banExpires": 10**400}, True),
    ],
)
def test_a_ban_holds_until_it_expires(claims: dict[str, Any], banned: bool) -> None:
    assert read(**claims).is_banned(1_800_000_000) is banned


@pytest.mark.parametrize(
    ("claims", "machine"),
    [({}, False), ({"client_id": "app"}, False), ({"client_id": "user1"}, True), ({"client_id": ""}, False)],
)
def test_a_subject_that_is_its_own_client_is_a_machine(claims: dict[str, Any], machine: bool) -> None:
    assert read(**claims).is_machine is machine


def test_claims_of_other_plugins_are_read_if_well_formed() -> None:
    principal = read(isAnonymous=True, impersonatedBy="admin1", sid="session1")
    assert principal.is_anonymous
    assert (principal.impersonated_by, principal.session_id) == ("admin1", "session1")
    principal = read(isAnonymous="true", impersonatedBy=None, sid=5)
    assert not principal.is_anonymous
    assert (principal.impersonated_by, principal.session_id) == (None, None)


def test_claims_with_unstorable_text_are_removed() -> None:
    kept = {"name": "Zoë 🦊", "list": [1, "two", {"three": None}], "n": 5, "no": None}
    removed = {
        "nul": "a\0b",
        "surrogate": "a\ud800",
        "deep": {"er": [["\udfff"]]},
        "named": {"a\0": 1},
        "bad\0name": "good",
    }
    assert without_unstorable(kept | removed) == kept


def test_an_unstorable_claim_lifts_no_restriction() -> None:
    claims = without_unstorable({**BASE, "banned": "\0", "key": {"\ud800": 1}, "role": ["admin", "a\0"]})
    principal = Principal.from_claims(claims, is_access_token=False)
    assert (principal.banned, principal.scopes, principal.roles) == (True, frozenset(), None)
    del claims["key"]
    assert Principal.from_claims(claims, is_access_token=False).roles == ()


def test_a_principal_can_be_copied_and_pickled() -> None:
    claims = {"sub": "u", "iss": "i", "iat": 1, "exp": 2, "role": "admin", "deep": {"list": [1, {"a": None}]}}
    others: tuple[dict[str, Any], ...] = ({"key": None, "scope": "a:b"}, {"role": ["a"]}, {"role": 5})
    for is_access_token, more in (True, {}), (False, {}), *((False, other) for other in others):
        principal = Principal.from_claims(claims | more, is_access_token=is_access_token)
        for twin in copy.deepcopy(principal), pickle.loads(pickle.dumps(principal)):  # noqa: S301 - pickled just now
            assert twin == principal
            assert twin.claims == principal.claims
    error = InvalidToken(Reason.EXPIRED)
    twin = pickle.loads(pickle.dumps(error))  # noqa: S301 - pickled just now
    assert (twin.reason, str(twin)) == (error.reason, str(error))


def test_a_principal_is_immutable() -> None:
    principal = read(nested={"list": [1, {"a": 1}]}, aud=["one", "two"], name="Ada")
    assert principal.claims["aud"] == ("one", "two")
    assert principal.claims["nested"]["list"][1]["a"] == 1
    with pytest.raises(AttributeError):
        principal.subject = "other"  # type: ignore[misc]  # that it cannot be is the test
    nested = principal.claims["nested"]
    mappings: list[Any] = [principal.claims, principal.profile, nested, nested["list"][1]]
    for mapping in mappings:
        with pytest.raises(TypeError):
            mapping["a"] = 2


def test_equality_hash_and_repr_of_principals() -> None:
    principal = read(email="ada@example.com", name="Ada", secret="s3cret")
    assert principal == read(email="ada@example.com", name="Ada", secret="s3cret")
    assert principal != read(email="other@example.com")
    assert hash(principal) == hash(read(email="ada@example.com", name="Ada", secret="s3cret"))
    assert repr(principal) == "Principal(subject='user1')"
    assert json.dumps(dict(principal.claims))
    assert Principal("s", "i", 0, 1).claims == {}
