"""Everything the environment can change, in one frozen object."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from backend.auth.fetch import check_url
from backend.web.proxies import network


def _split(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _web_address(value: str) -> str:
    """As a browser would write it (WHATWG URL), since Better Auth does: lower case, no port that goes unsaid."""
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
    # What libpq takes for a host or a port it quotes when it cannot be reached, and it may be half a password.
    ports = str(parts.get("port") or "0").split(",")
    if "@" in str(parts.get("host")) or not all(port.isascii() and port.isdigit() for port in ports):
        raise ValueError("write what is special in its password as %XX (`/` is %2F, `@` %40, `%` %25)")
    return value


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        try:
            network(text)
        except ValueError as error:
            raise ValueError(f"{text!r} cannot be trusted: {error}") from None
    return value


def _rate(value: str) -> str:
    if value != "off" and not _RATE.fullmatch(value):
        raise ValueError("must be such as 600/minute (or second, hour, day), or off")
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
    """Read from the environment and from `.env`; a wrong value is an error before anything starts.

    A name that is left empty counts as unset, so that `.env.example` can be copied as it stands.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    database_url: DatabaseAddress = Field(
        default="",
        validate_default=False,
        description="PostgreSQL 18 or newer. Any login that may `SET ROLE api_user` and `api_system` will do. "
        "Unset under `resource-server dev`: an embedded server in `.data/`.",
    )
    database_direct_url: DatabaseAddress = Field(
        default="",
        validate_default=False,
        description="The same database past any transaction pooler, for migrations and to LISTEN. "
        "Default: `DATABASE_URL`.",
    )
    database_pool_size: int = Field(
        default=10,
        ge=5,
        le=1000,
        description="Connections per worker that serve requests. Two more listen for changes and answer `/readyz`.",
    )
    database_prepare: Literal["on", "off"] = Field(
        default="on", description="Prepared statements. `off` behind a pgbouncer older than 1.21."
    )
    public_url: WebAddress = Field(
        default="http://localhost:8000",
        description="This API's own public address: its RFC 9728 resource identifier, and an accepted audience. "
        "Default: `http://localhost:8000`.",
    )
    better_auth_url: WebAddress = Field(
        default="http://localhost:3000",
        description="Where Better Auth lives: its origin, or its full base address when that has a path of its own. "
        "Default: `http://localhost:3000`; under `resource-server dev`: a reference issuer.",
    )
    better_auth_issuers: Names = Field(
        default=(),
        description="Accepted `iss` values, comma-separated, all names of ONE server; users are filed under the first. "
        "Default: the origin of `BETTER_AUTH_URL`, and its base address (`/api/auth` unless it has a path).",
    )
    better_auth_audiences: Names = Field(
        default=(),
        description="Accepted `aud` values, comma-separated. Default: `BETTER_AUTH_URL`'s origin, and `PUBLIC_URL`.",
    )
    better_auth_jwks_url: WebAddress = Field(
        default="",
        validate_default=False,
        description="Where the keys are fetched: https, or http to a loopback address; may be another address than the "
        "public one. Default: `/jwks` below the base address.",
    )
    token_max_lifetime: int = Field(
        default=3600, ge=60, le=86400, description="Longest accepted `exp - iat` of a token, in seconds."
    )
    security_events_audience: str = Field(
        default="",
        description="`aud` of the security events that Better Auth sends here. "
        "Default: `{PUBLIC_URL}/api/v1/security-events`.",
    )
    cors_origins: Names = Field(
        default=(), description="Origins whose pages may call this API, comma-separated, exact. Default: none."
    )
    trusted_hosts: Annotated[Names, AfterValidator(_host_patterns)] = Field(
        default=("*",), description="Accepted `Host` names, comma-separated, `*.example.com` allowed. Default: any."
    )
    trusted_proxies: Annotated[Names, AfterValidator(_networks)] = Field(
        default=(),
        description="Addresses or networks, comma-separated, whose `X-Forwarded-For` and `X-Forwarded-Proto` are "
        "believed. Default: none.",
    )
    rate_limit: Annotated[str, AfterValidator(_rate)] = Field(
        default="600/minute",
        description="Requests per user, and per address without a good token: a number per `second`, `minute`, `hour` "
        "or `day`; `off`.",
    )
    redis_url: Annotated[str, AfterValidator(_redis_address)] = Field(
        default="",
        validate_default=False,
        description="A Redis in which all workers share the rate limits. Default: each worker counts alone.",
    )
    drain_seconds: float = Field(
        default=5,
        ge=0,
        le=600,
        description="Seconds to go on serving after SIGTERM, while `/readyz` is 503, so that load balancers notice. "
        "What is still being answered then gets 20 seconds more.",
    )
    metrics: Literal["on", "off"] = Field(default="on", description="Prometheus metrics at `/metrics`.")
    metrics_token: SecretStr = Field(
        default=SecretStr(""), description="What `/metrics` wants as a bearer. Default: it is open to all."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged.")
    log_format: Literal["json", "console"] | None = Field(
        default=None,
        description="`json`: one object a line. `console`: for people. Default: `console` in a terminal, else `json`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _names_in_lower_case(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in ("log_level", "log_format", "database_prepare", "rate_limit", "metrics"):
                if isinstance(data.get(name), str):
                    data[name] = data[name].lower()
        return data

    @model_validator(mode="after")
    def _addresses_will_do(self) -> "Settings":
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
        """Requests, and the seconds they may be spread over; None when there is no limit."""
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
        """Where its endpoints are. Better Auth mounts itself at /api/auth unless its base URL has a path of its own."""
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


def explain(error: ValidationError) -> str:
    """One line per wrong setting, by its variable's name and never with its value, which may be a secret."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = "_".join(map(str, problem["loc"][:1])).upper()
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{name}: {message}" if name else message)
    return "\n".join(lines)
