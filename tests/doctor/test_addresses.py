"""The doctor's checks of the configured addresses, which need no network."""

import pytest

from backend.doctor.addresses import examine_addresses
from backend.doctor.findings import Level
from backend.settings import Settings
from tests.doctor.report import assert_contains

PUBLIC = {"better_auth_url": "https://app.example.com", "public_url": "https://api.example.com"}


@pytest.mark.parametrize(
    ("settings", "level", "words"),
    [
        ({"better_auth_url": "https://app.example.com"}, Level.WARNING, ["this machine only", "set PUBLIC_URL"]),
        (PUBLIC | {"public_url": "http://api.example.com"}, Level.WARNING, ["unencrypted", "set PUBLIC_URL", "https"]),
        (
            PUBLIC | {"public_url": "https://app.example.com"},
            Level.WARNING,
            ["Better Auth's address", "set PUBLIC_URL"],
        ),
        (
            PUBLIC | {"cors_origins": ("https://app.example.com:443",)},
            Level.FAILURE,
            ["browsers never send https://app.example.com:443", "write https://app.example.com in CORS_ORIGINS"],
        ),
        (
            PUBLIC | {"cors_origins": ("https://App.example.com",)},
            Level.FAILURE,
            ["https://app.example.com in CORS_ORIGINS"],
        ),
        (
            PUBLIC | {"cors_origins": ("https://app.example.com", "http://localhost:3000")},
            Level.WARNING,
            ["http://localhost:3000", "a user's machine", "CORS_ORIGINS"],
        ),
        (
            PUBLIC | {"cors_origins": ("https://app.example.com", "http://www.example.com")},
            Level.WARNING,
            ["http://www.example.com", "use https in CORS_ORIGINS"],
        ),
        (
            PUBLIC | {"cors_origins": ("https://www.example.com",)},
            Level.WARNING,
            ["https://app.example.com cannot call", "CORS_ORIGINS"],
        ),
        (
            PUBLIC | {"better_auth_audiences": ("abcdefghijklmnopqrstuvwxyzABCDEF",)},
            Level.WARNING,
            ["an OAuth client", "BETTER_AUTH_AUDIENCES"],
        ),
    ],
)
def test_a_wrong_address_is_reported_with_its_setting(
    settings: dict[str, object], level: Level, words: list[str]
) -> None:
    found = [
        finding
        for finding in examine_addresses(Settings(_env_file=None, **settings))  # type: ignore[arg-type]  # as read
        if finding.level is not Level.OK
    ]
    finding = found[0]
    assert finding.level is level
    assert_contains(finding.text, words)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        PUBLIC,
        PUBLIC | {"cors_origins": ("https://app.example.com",)},
        {"cors_origins": ("http://localhost:3000", "http://[::1]:3000")},
        {"better_auth_url": "https://example.com", "public_url": "https://example.com/tasks"},
    ],
)
def test_correct_addresses_are_ok(settings: dict[str, object]) -> None:
    found = list(examine_addresses(Settings(_env_file=None, **settings)))  # type: ignore[arg-type]  # as read
    assert {finding.level for finding in found} == {Level.OK}
