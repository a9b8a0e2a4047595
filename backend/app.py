"""The application: routers, middleware and the objects that live as long as the process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pkgutil import resolve_name
from typing import TypedDict

from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from sqlalchemy import MetaData
from sqlmodel import SQLModel

from backend import __version__, migrations
from backend.auth import Bearer, RemoteKeys, TokenVerifier
from backend.database import Pool
from backend.operations import health, metrics, tracing
from backend.operations.access_log import AccessLog
from backend.operations.log_lines import configure_own_logging
from backend.operations.metrics import Metrics
from backend.operations.shutdown import on_shutdown
from backend.resources.retention import purging
from backend.settings import InvalidSettings, Settings, load
from backend.sync.broker import Broker
from backend.users.cache_invalidation import Listener
from backend.users.caller import CallerRoute, require_permissions
from backend.users.provisioning import Users
from backend.users.security_events.service import SecurityEvents
from backend.web import resource_metadata
from backend.web.application import Application
from backend.web.event_quotas import EventQuotas
from backend.web.middleware import CrossOrigin, HeadAsGet
from backend.web.proxies import TrustedProxies
from backend.web.quotas import Quota
from backend.web.rate_limits import RateLimiting, RateLimits
from backend.web.start_up import StartError

# One line per router. Features that are not listed are not imported, so their routes and tables do not exist.
ROUTERS = (
    "backend.users.router:router",
    "backend.users.admin.router:router",
    "backend.users.security_events.router:router",
    "backend.tasks.router:router",
    "backend.tasks.router:batch_router",
    "backend.tasks.router:tags_router",
)

# From the innermost to the outermost, around middleware of a fork. tests/test_app.py checks the order.
MIDDLEWARE = (RateLimiting, CrossOrigin, HeadAsGet, AccessLog)


class State(TypedDict):
    """Objects that live as long as the process, available as `request.state`."""

    settings: Settings
    pool: Pool
    keys: RemoteKeys
    bearer: Bearer
    users: Users
    broker: Broker
    security_events: SecurityEvents
    rate_limits: RateLimits | None
    proxies: TrustedProxies | None
    metrics: Metrics | None
    schema: health.SchemaCheck
    stopping: asyncio.Event


def create_app(settings: Settings | None = None, *, telemetry: TelemetryConfig | None = None) -> Application:
    """Build the application.

    Connections are opened at start-up, so that the OpenAPI document needs no settings. Start-up does not wait for the
    database or the issuer: while one is unavailable, requests that need it are answered with 503. Start-up raises
    StartError for invalid settings and for routes without a permission.

    `settings`, `telemetry`: None reads them from the environment, the settings at start-up.
    """
    if telemetry is None and settings is None:
        with suppress(tracing.NotInstalled):  # reported at start-up
            telemetry = tracing.from_environment()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        require_permissions(app.routes)
        config = settings or read_settings()
        app.compiled_routes.start(is_on=config.fast_dispatch == "on")
        observer = Metrics() if config.metrics == "on" else None
        async with (
            RemoteKeys(config.jwks_url, max_stale=config.token_max_lifetime, observer=observer) as keys,
            Pool(config.database_url, size=config.database_pool_size, prepare=config.database_prepare == "on") as pool,
            purging(pool, metrics=observer),
            limiting(config, observer) as rate_limits,
        ):
            verifier = TokenVerifier(
                keys=keys,
                issuers=config.issuers,
                audiences=config.audiences,
                max_lifetime=config.token_max_lifetime,
                observer=observer,
            )
            users = Users(pool, config.issuers[0])
            broker = Broker(pool)
            async with (
                Listener(config.direct_url, pool, users),
                broker.polling(),
                measuring(observer, pool, keys, users, broker, rate_limits),
                health.checking(pool, migrations.head()) as schema,
            ):
                state = State(
                    settings=config,
                    pool=pool,
                    keys=keys,
                    bearer=Bearer(verifier, resource_metadata=resource_metadata.url(config.public_url)),
                    users=users,
                    broker=broker,
                    security_events=SecurityEvents(
                        pool,
                        users,
                        keys=keys,
                        issuers=config.issuers,
                        audience=config.events_audience,
                        judged=observer.security_event if observer else None,
                        quotas=EventQuotas(on_rejection=observer.limited if observer else None),
                    ),
                    rate_limits=rate_limits,
                    proxies=TrustedProxies(config.trusted_proxies) if config.trusted_proxies else None,
                    metrics=observer,
                    schema=schema,
                    stopping=asyncio.Event(),
                )
                with on_shutdown(state["stopping"].set, broker.stop, after=config.drain_seconds):
                    yield state

    app = Application(
        title="Better Auth resource server",
        summary="Task lists for users of Better Auth.",
        description=DESCRIPTION,
        version=__version__,
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=openapi_tags(),
        lifespan=lifespan,
        telemetry=telemetry,
        compiled=CallerRoute,
        outer=MIDDLEWARE,
    )
    for router in health.router, metrics.router, resource_metadata.router, *map(resolve_name, ROUTERS):
        app.include_router(router)
    return app


def read_settings() -> Settings:
    """Read the settings, and configure logging as they say unless the server has. Raises StartError."""
    try:
        settings = load()
        tracing.is_wanted()
    except (InvalidSettings, tracing.NotInstalled) as error:
        raise StartError(str(error)) from None
    configure_own_logging(settings.log_level, settings.log_format)
    return settings


def tables() -> MetaData:
    """The tables of all features that are listed."""
    for router in ROUTERS:
        resolve_name(router)
    return SQLModel.metadata


@asynccontextmanager
async def limiting(settings: Settings, metrics: Metrics | None) -> AsyncIterator[RateLimits | None]:
    """The rate limits of the settings, shared through Redis if one is configured; None if they are off."""
    if settings.rate_quota is None:
        yield None
        return
    quota, on_rejection = Quota(*settings.rate_quota), metrics.limited if metrics else None
    if not settings.redis_url:
        yield RateLimits(quota, on_rejection=on_rejection)
        return
    from backend.web.rate_limits_redis import SharedCounters  # importing the client takes 0.1 s

    async with SharedCounters(settings.redis_url, window=quota.window) as shared:
        yield RateLimits(quota, shared=shared, on_rejection=on_rejection)


@asynccontextmanager
async def measuring(
    metrics: Metrics | None, pool: Pool, keys: RemoteKeys, users: Users, broker: Broker, limits: RateLimits | None
) -> AsyncIterator[None]:
    """Sample gauges of the parts of the application."""
    if metrics is None:
        yield
        return
    sources: dict[str, Callable[[], float]] = {
        "database_connections": lambda: pool.in_use,
        "database_connections_limit": lambda: pool.size,
        "database_waiting": lambda: pool.waiting,
        "key_set_ready": lambda: keys.ready,
        "key_set_skipped_keys": lambda: len(keys.status().skipped),
        "key_set_waiting": lambda: keys.status().waiting,
        "users_remembered": lambda: len(users),
        "users_believed": lambda: users.is_current,
        "streams": lambda: len(broker),
    }
    if limits is not None and limits.shared is not None:
        sources["rate_limits_shared"] = limits.shared.up.is_set
    async with metrics.sampling(lambda: users.loads, **sources):
        yield


DESCRIPTION = """
Get a JWT from Better Auth (`GET /api/auth/token` with a session) and send it as `Authorization: Bearer`. All resources
belong to the authenticated user. Every error is `application/problem+json` with a stable `code`.
"""


def openapi_tags() -> list[dict[str, str | None]]:
    """The tags of the OpenAPI document: one per feature, described by the docstring of its package."""
    features = dict.fromkeys(name.split(".")[1] for name in ROUTERS)
    tags = [{"name": name, "description": import_module(f"backend.{name}").__doc__} for name in features]
    return [*tags, {"name": "service", "description": "Public: version, health and resource metadata."}]


# For ASGI servers, such as `uvicorn backend.app:app`.
app = create_app()
