"""The settings: accepted values, derived values, error messages, and their documentation."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from backend.docs_pages import settings_page
from backend.settings import Settings, explain

ROOT = Path(__file__).parents[1]
NAMES = [name.upper() for name in Settings.model_fields]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def read(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings(_env_file=None)


@pytest.mark.parametrize(
    ("url", "issuers", "jwks"),
    [
        (
            "http://localhost:3000",
            ("http://localhost:3000", "http://localhost:3000/api/auth"),
            "http://localhost:3000/api/auth/jwks",
        ),
        (
            "https://auth.example.com/auth/v1/",
            ("https://auth.example.com", "https://auth.example.com/auth/v1"),
            "https://auth.example.com/auth/v1/jwks",
        ),
        (
            "HTTPS://Auth.Example.com:443/auth/v1",
            ("https://auth.example.com", "https://auth.example.com/auth/v1"),
            "https://auth.example.com/auth/v1/jwks",
        ),
        (
            "http://[::1]:3000",
            ("http://[::1]:3000", "http://[::1]:3000/api/auth"),
            "http://[::1]:3000/api/auth/jwks",
        ),
        (
            "https://example.com/api/auth",
            ("https://example.com", "https://example.com/api/auth"),
            "https://example.com/api/auth/jwks",
        ),
    ],
)
def test_issuers_audiences_and_jwks_url_are_derived_from_better_auth_url(
    monkeypatch: pytest.MonkeyPatch, url: str, issuers: tuple[str, ...], jwks: str
) -> None:
    settings = read(monkeypatch, BETTER_AUTH_URL=url)
    assert settings.issuers == issuers
    assert settings.audiences == (issuers[0], "http://localhost:8000")
    assert settings.jwks_url == jwks


def test_issuers_audiences_and_jwks_url_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch,
        BETTER_AUTH_ISSUERS="https://a.example, https://b.example/x ,",
        BETTER_AUTH_AUDIENCES="tasks",
        BETTER_AUTH_JWKS_URL="http://127.0.0.1:3001/api/auth/jwks",
        CORS_ORIGINS="https://app.example.com,http://localhost:3000",
    )
    assert settings.issuers == ("https://a.example", "https://b.example/x")
    assert settings.audiences == ("tasks",)
    assert settings.jwks_url == "http://127.0.0.1:3001/api/auth/jwks"
    assert settings.cors_origins == ("https://app.example.com", "http://localhost:3000")


def test_an_empty_value_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **dict.fromkeys(NAMES, "")) == Settings(_env_file=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://user:hunter2@host/db"),
        ("DATABASE_URL", "postgresql://api:hunter2/x@host/db"),
        ("DATABASE_URL", "postgresql://api:x/hunter2@host/db"),
        ("DATABASE_URL", "postgresql://api:x@hunter2@host/db"),
        ("DATABASE_URL", "postgresql://api:%hunter2@host/db"),
        ("DATABASE_DIRECT_URL", "postgresql://host:54.32/hunter2"),
        ("DATABASE_POOL_SIZE", "4"),
        ("DATABASE_PREPARE", "maybe"),
        ("PUBLIC_URL", "localhost:8000"),
        ("BETTER_AUTH_URL", "ftp://example.com"),
        ("BETTER_AUTH_URL", "http://user:hunter2@example.com"),
        ("BETTER_AUTH_URL", "http://[::1"),
        ("BETTER_AUTH_JWKS_URL", "http://example.com/jwks?x=1"),
        ("BETTER_AUTH_JWKS_URL", "http://better-auth:3000/api/auth/jwks"),
        ("BETTER_AUTH_URL", "http://localhost:99999"),
        ("PUBLIC_URL", "http://bücher.example"),
        ("TRUSTED_HOSTS", "ex*mple.com"),
        ("TRUSTED_HOSTS", "https://example.com"),
        ("TOKEN_MAX_LIFETIME", "5"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "https://app.example.com/"),
        ("TRUSTED_PROXIES", "proxy.example.com"),
        ("TRUSTED_PROXIES", "10.0.0.1, 0.0.0.0/0"),
        ("TRUSTED_PROXIES", "::/0"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("RATE_LIMIT", "600"),
        ("RATE_LIMIT", "0/minute"),
        ("RATE_LIMIT", "6/fortnight"),
        ("REDIS_URL", "http://:hunter2@redis:6379"),
        ("METRICS", "some"),
        ("FAST_DISPATCH", "fast"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_an_invalid_value_is_reported_in_one_line_without_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with pytest.raises(ValidationError) as error:
        read(monkeypatch, **{name: value})
    line = explain(error.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    assert "hunter2" not in line + str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://api:hunter%2F2@host/db",
        "postgres://api@a:5432,b:5433/db?target_session_attrs=read-write",
        "postgresql://?host=/run/postgresql&dbname=db",
        "postgresql://[::1]:5432/db",
        "postgresql://api:a#b@host",
    ],
)
def test_every_form_of_a_libpq_url_is_accepted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    assert read(monkeypatch, DATABASE_URL=url).database_url == url


@pytest.mark.parametrize(
    ("value", "quota"),
    [("600/minute", (600, 60)), ("10/second", (10, 1)), ("5/Hour", (5, 3600)), ("7/day", (7, 86400)), ("OFF", None)],
)
def test_a_rate_limit_is_a_number_per_period(
    monkeypatch: pytest.MonkeyPatch, value: str, quota: tuple[int, int] | None
) -> None:
    assert read(monkeypatch, RATE_LIMIT=value).rate_quota == quota


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings(_env_file=None), "database_url", "postgresql://elsewhere")  # noqa: B010  # mypy rejects an assignment


def test_the_example_file_documents_every_setting_and_sets_none() -> None:
    text = (ROOT / ".env.example").read_text()
    assert re.findall(r"^#? ?([A-Z_]+)=", text, re.MULTILINE) == NAMES
    for field in Settings.model_fields.values():
        assert str(field.description) in re.sub(r"\n# ", " ", text)
    copied = Settings(_env_file=ROOT / ".env.example")
    assert copied == Settings(_env_file=None)
    # `resource-server dev` starts a database and an issuer if these are not set.
    assert not copied.model_fields_set & {"database_url", "better_auth_url", "public_url"}


def test_the_settings_page_is_up_to_date() -> None:
    assert (ROOT / "docs/settings.md").read_text() == settings_page(), (
        "run `.venv/bin/resource-server settings > docs/settings.md`"
    )
    assert re.findall(r"^## (\w+)$", settings_page(), re.MULTILINE) == NAMES
