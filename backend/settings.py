"""The settings, read from the environment."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from backend.auth.jwks_fetch import check_url
from backend.web.proxies import network


def _split(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _web_address(value: str) -> str:
    """Normalize an address as browsers and Better Auth do (WHATWG URL): lower case, without the default port."""
    parts = urlsplit(value)
    if parts.scheme not in _PORTS or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError("must be an http(s) address without query, fragment or credentials")
    if not value.isascii():
        raise ValueError("must be ASCII: write an international name in its xn-- form")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _host_patterns(value: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in value:
        if not _HOST_PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is not a host name, *.example.com, or *")
    return value or ("*",)


def _database_address(value: str) -> str:
    if not value.startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://")
    try:
        parts = conninfo_to_dict(value)
    except ProgrammingError:
        parts = {"port": "unreadable"}
    # If a special character in the password is not escaped, libpq reads a part of the password as host or port, and
    # quotes it in error messages.
    ports = str(parts.get("port") or "0").split(",")
    if "@" in str(parts.get("host")) or not all(port.isascii() and port.isdigit() for port in ports):
        raise ValueError("percent-encode special characters in the password (`/` as %2F, `@` as %40, `%` as %25)")
    return value


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        try:
            network(text)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
    return value


def _rate(value: str) -> str:
    if value != "off" and not _RATE.fullmatch(value):
        raise ValueError("must be a rate such as 600/minute (or per second, hour, day), or off")
    return value


def _redis_address(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return value


_PORTS = {"http": 80, "https": 443}
_HOST_PATTERN = re.compile(r"\*|(\*\.)?[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")

_RATE = re.compile(r"([1-9]\d{0,11})/(second|minute|hour|day)")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}

Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
WebAddress = Annotated[str, AfterValidator(_web_address)]
DatabaseAddress = Annotated[str, AfterValidator(_database_address)]


class Settings(BaseSettings):
    """Read from the environment and from `.env`. Raises ValidationError for an invalid value.

    An empty variable counts as unset, so that `.env.example` can be copied unchanged.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    database_url: DatabaseAddress = Field(
        default="",
        validate_default=False,
        description="Address of PostgreSQL 18 or newer, with a login that may `SET ROLE api_user` and `api_system`. "
        "Default under `resource-server dev`: an embedded server in `.data/`.",
    )
    database_direct_url: DatabaseAddress = Field(
        default="",
        validate_default=False,
        description="Address of the same database that bypasses a transaction pooler, for migrations and LISTEN. "
        "Default: `DATABASE_URL`.",
    )
    database_pool_size: int = Field(
        default=12,
        ge=5,
        le=1000,
        description="Database connections per worker. Each worker opens two more, for LISTEN and `/readyz`.",
    )
    database_prepare: Literal["on", "off"] = Field(
        default="on", description="Use prepared statements. Set to `off` behind PgBouncer older than 1.21."
    )
    public_url: WebAddress = Field(
        default="http://localhost:8000",
        description="Public address of this API: its resource identifier (RFC 9728) and an accepted audience. "
        "Default: `http://localhost:8000`.",
    )
    better_auth_url: WebAddress = Field(
        default="http://localhost:3000",
        description="Address of Better Auth: its origin, or its base address if the path is not `/api/auth`. "
        "Default: `http://localhost:3000`; under `resource-server dev`: the reference issuer.",
    )
    better_auth_issuers: Names = Field(
        default=(),
        description="Accepted `iss` values of ONE server, comma-separated; users are stored under the first. "
        "Default: the origin and the base address of `BETTER_AUTH_URL`.",
    )
    better_auth_audiences: Names = Field(
        default=(),
        description="Accepted `aud` values, comma-separated. Default: `BETTER_AUTH_URL`'s origin and `PUBLIC_URL`.",
    )
    better_auth_jwks_url: WebAddress = Field(
        default="",
        validate_default=False,
        description="Address of the JWKS: https, or http to a loopback address. It may differ from the public address. "
        "Default: `/jwks` below the base address.",
    )
    token_max_lifetime: int = Field(
        default=3600, ge=60, le=86400, description="Maximum accepted lifetime of a token (`exp - iat`), in seconds."
    )
    security_events_audience: str = Field(
        default="",
        description="`aud` of security events from Better Auth. Default: `{PUBLIC_URL}/api/v1/security-events`.",
    )
    cors_origins: Names = Field(
        default=(), description="Origins of web pages that may call this API, comma-separated. Default: none."
    )
    trusted_hosts: Annotated[Names, AfterValidator(_host_patterns)] = Field(
        default=("*",), description="Accepted `Host` names, comma-separated, such as `*.example.com`. Default: any."
    )
    trusted_proxies: Annotated[Names, AfterValidator(_networks)] = Field(
        default=(),
        description="Addresses or networks of proxies whose `X-Forwarded-For` and `X-Forwarded-Proto` are trusted, "
        "comma-separated. Default: none.",
    )
    rate_limit: Annotated[str, AfterValidator(_rate)] = Field(
        default="600/minute",
        description="Limit of requests per user, and per IP address without a valid token: a number per `second`, "
        "`minute`, `hour` or `day`; or `off`.",
    )
    redis_url: Annotated[str, AfterValidator(_redis_address)] = Field(
        default="",
        validate_default=False,
        description="A Redis through which workers share the rate limits. Default: each worker counts alone.",
    )
    drain_seconds: float = Field(
        default=5,
        ge=0,
        le=600,
        description="Seconds to keep serving after SIGTERM while `/readyz` is 503, so that load balancers notice. "
        "Requests in progress then have 20 more seconds.",
    )
    metrics: Literal["on", "off"] = Field(default="on", description="Serve Prometheus metrics at `/metrics`.")
    metrics_token: SecretStr = Field(
        default=SecretStr(""), description="Bearer token for `/metrics`. Default: none, so it is public."
    )
    fast_dispatch: Literal["on", "off"] = Field(
        default="on",
        description="Use compiled dispatch for the routes that it supports. Set to `off` to let FastAPI handle all "
        "requests, which takes several times the processor time.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Minimum log level.")
    log_format: Literal["json", "console"] | None = Field(
        default=None,
        description="`json`: one object per line. `console`: text. Default: `console` in a terminal, else `json`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _lower_case(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("log_level", "log_format", "database_prepare", "fast_dispatch", "rate_limit", "metrics"):
                if isinstance(data.get(name), str):
                    data[name] = data[name].lower()
        return data

    @model_validator(mode="after")
    def _check_addresses(self) -> "Settings":
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"CORS_ORIGINS: {origin!r} is not an origin such as https://app.example.com")
        try:
            check_url(self.jwks_url)
        except ValueError as error:
            raise ValueError(f"BETTER_AUTH_JWKS_URL: {error}") from None
        return self

    @property
    def rate_quota(self) -> tuple[int, int] | None:
        """The number of requests and the window in seconds; None without a limit."""
        rate = _RATE.fullmatch(self.rate_limit)
        return (int(rate[1]), _SECONDS[rate[2]]) if rate else None

    @property
    def direct_url(self) -> str:
        return self.database_direct_url or self.database_url

    @property
    def _origin(self) -> str:
        parts = urlsplit(self.better_auth_url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def base_url(self) -> str:
        """The address of Better Auth's endpoints: below /api/auth unless its base URL has another path."""
        return self.better_auth_url if urlsplit(self.better_auth_url).path else f"{self.better_auth_url}/api/auth"

    @property
    def issuers(self) -> tuple[str, ...]:
        return self.better_auth_issuers or (self._origin, self.base_url)

    @property
    def audiences(self) -> tuple[str, ...]:
        return self.better_auth_audiences or (self._origin, self.public_url)

    @property
    def events_audience(self) -> str:
        return self.security_events_audience or f"{self.public_url}/api/v1/security-events"

    @property
    def jwks_url(self) -> str:
        return self.better_auth_jwks_url or f"{self.base_url}/jwks"


class InvalidSettings(ValueError):
    """The environment contains invalid settings. The message has one line for each."""


def load(*, database: bool = True) -> Settings:
    """Read the settings. Raises InvalidSettings. `database`: DATABASE_URL is required."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise InvalidSettings(explain(error)) from None
    if database and not settings.database_url:
        raise InvalidSettings("DATABASE_URL: is not set (only `resource-server dev` can run without)")
    return settings


def explain(error: ValidationError) -> str:
    """One line per invalid setting, with the name of its variable but not its value, which may be a secret."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = "_".join(map(str, problem["loc"][:1])).upper()
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {message}" if name else message)
    return "\n".join(lines)
