"""The command `resource-server`. Each sub-command reports an error in one line and imports only what it needs."""

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from backend import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

    from backend.settings import Settings

# Seconds; longer than the 60 of common proxies, so that a proxy does not send a request on a connection being closed.
_KEEP_ALIVE = 75


class CommandError(Exception):
    """Ends the command with a message and an exit code: 2 for invalid settings, else 1."""

    def __init__(self, message: object, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except CommandError as error:
        _print(str(error))
        return error.code
    except KeyboardInterrupt:
        return 130
    return code


def dev(options: argparse.Namespace) -> int:
    """Run the API, Better Auth and PostgreSQL on this machine, with reload on changes"""
    return _up(options)


def web(options: argparse.Namespace) -> int:
    """Run everything that `dev` runs, with the web app, which contains Better Auth"""
    return _up(options, web=True)


def _up(options: argparse.Namespace, *, web: bool = False) -> int:
    from backend.dev import DevError
    from backend.dev.up import up

    try:
        return up(
            port=options.port,
            issuer_port=options.issuer_port,
            data_dir=options.data_dir,
            settings=_settings(),
            say=_print,
            web=web,
        )
    except DevError as error:
        raise CommandError(error) from error


def serve(options: argparse.Namespace) -> int:
    """Serve the API for production; requires a migrated database"""
    from contextlib import nullcontext

    import uvicorn

    from backend import migrations
    from backend.operations import tracing
    from backend.operations.log_lines import configure_logging
    from backend.operations.metrics import shared_by_workers

    settings = _settings(database=True)
    try:
        if reason := migrations.pending(settings.direct_url):
            if not options.migrate:
                raise CommandError(reason)
            migrations.upgrade(settings.direct_url)
        if options.migrate and options.workers == 1:  # the supervisor of several workers does not import the features
            from backend.app import tables

            if reason := migrations.missing(settings.direct_url, tables()):
                raise CommandError(reason)
        tracing.is_wanted()
    except (migrations.MigrationError, tracing.NotInstalled) as error:
        raise CommandError(" ".join(str(error).split())) from error
    configure_logging(settings.log_level, settings.log_format)
    with shared_by_workers() if options.workers > 1 and settings.metrics == "on" else nullcontext():
        uvicorn.run(
            "backend.cli:application",
            factory=True,
            host=options.host,
            port=options.port,
            fd=options.fd,
            workers=options.workers,
            loop="uvloop",
            http="backend.web.server:Protocol",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=20,
            timeout_worker_healthcheck=30,  # a restarted worker needs time on a busy machine
        )
    return 0


def application() -> "FastAPI":
    """The application, with logging configured, in each worker process of `serve`."""
    from backend.app import app
    from backend.operations.log_lines import configure_logging
    from backend.operations.shutdown import stop_with_parent

    settings = _settings(database=True)
    configure_logging(settings.log_level, settings.log_format)
    stop_with_parent()
    # Imported objects are never garbage; collecting them would pause all requests for 90 ms.
    gc.collect()
    gc.freeze()
    return app


def migrate(_: argparse.Namespace) -> int:
    """Migrate the database to the newest revision; safe to run on several machines at once"""
    from backend import migrations

    try:
        migrations.upgrade(_settings(database=True).direct_url)
    except migrations.MigrationError as error:
        raise CommandError(" ".join(str(error).split())) from error
    _print(f"the database is at revision {migrations.head()}")
    return 0


def reinstate(options: argparse.Namespace) -> int:
    """End the suspension of a user without an administrator; a ban can only be lifted at Better Auth"""
    import asyncio

    import psycopg

    from backend import migrations
    from backend.database import LEAST_SIZE, Pool
    from backend.users.admin import service

    settings = _settings(database=True)
    try:
        if reason := migrations.pending(settings.direct_url):
            raise CommandError(reason)
    except migrations.MigrationError as error:
        raise CommandError(" ".join(str(error).split())) from error

    async def run() -> dict[str, object]:
        async with Pool(settings.database_url, size=LEAST_SIZE, prepare=settings.database_prepare == "on") as pool:
            return await service.reinstate(pool, settings.issuers[0], options.user)

    try:
        row = asyncio.run(run())
    except LookupError as error:
        raise CommandError(f"{options.user} {error}") from error
    except psycopg.Error as error:
        raise CommandError(f"database error: {type(error).__name__}") from error
    note = ": banned at Better Auth; unban them there" if row["banned"] else ""
    _print(f"{row['subject']} is {row['status']}{note}")
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Check settings, database, issuer and a token, and report what to change"""
    import asyncio

    from backend.doctor import report

    token: str | None = options.token
    if token == "-":  # noqa: S105  # arguments are visible to other users of the machine
        token = sys.stdin.read()

    return 0 if asyncio.run(report(_settings(), token and token.strip(), sys.stdout)) else 1


def new(options: argparse.Namespace) -> int:
    """Write a new resource into this checkout: its code, a test and the migration"""
    from backend.dev import DevError
    from backend.dev.new_resource import new_resource

    try:
        _print("\n".join(new_resource(options.name, options.singular, _settings())))
    except DevError as error:
        raise CommandError(error) from error
    return 0


def openapi(_: argparse.Namespace) -> int:
    """Print the OpenAPI document as JSON"""
    import json

    from backend.app import app

    sys.stdout.write(json.dumps(app.openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return 0


def settings(_: argparse.Namespace) -> int:
    """Print all settings as Markdown"""
    from backend.docs_pages import settings_page

    sys.stdout.write(settings_page())
    return 0


def routes(_: argparse.Namespace) -> int:
    """Print all routes as Markdown"""
    from backend.app import app
    from backend.docs_pages import routes_page

    sys.stdout.write(routes_page(app.openapi()))
    return 0


def token(options: argparse.Namespace) -> int:
    """Print a JWT of a demo user, issued by the reference issuer at BETTER_AUTH_URL"""
    import httpx

    from backend.dev.people import DEMO_EMAIL, Refused, demo_token

    settings = _settings()
    try:
        jwt = demo_token(settings.base_url, options.email or DEMO_EMAIL)
    except (Refused, ValueError) as error:
        raise CommandError(f"{settings.better_auth_url}: {error}") from error
    except httpx.HTTPError as error:
        raise CommandError(f"no issuer at {settings.better_auth_url}; start one with `make dev`") from error
    sys.stdout.write(f"{jwt}\n")
    return 0


def _settings(*, database: bool = False) -> "Settings":
    from backend.settings import InvalidSettings, load

    try:
        return load(database=database)
    except InvalidSettings as error:
        raise CommandError(error, code=2) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resource-server", description="A resource server for Better Auth.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    added = {}
    for run in (dev, web, serve, migrate, reinstate, doctor, new, settings, routes, openapi, token):
        added[run] = commands.add_parser(run.__name__, help=run.__doc__, description=f"{run.__doc__}.")
        added[run].set_defaults(run=run)
    for command in (added[dev], added[web]):
        command.add_argument("--port", type=_port, default=8000, help="port of the API (%(default)s; 0: any)")
        command.add_argument("--issuer-port", type=_port, default=3000, help="Better Auth's port (%(default)s; 0: any)")
        command.add_argument("--data-dir", type=Path, default=Path(".data"), help="directory of the data (%(default)s)")
    added[serve].add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    added[serve].add_argument("--port", type=_port, default=8000, help="port to listen on (%(default)s)")
    added[serve].add_argument("--fd", type=int, help="inherited listening socket, instead of host and port")
    added[serve].add_argument("--workers", type=int, default=1, help="number of worker processes (%(default)s)")
    added[serve].add_argument("--migrate", action="store_true", help="migrate the database before starting")
    added[reinstate].add_argument("user", metavar="USER", help="id of the user in this API or at Better Auth")
    added[doctor].add_argument("--token", help="JWT or session token to check; -: read it from standard input")
    added[new].add_argument("name", metavar="NAME", help="plural in lower case, such as bank_accounts")
    added[new].add_argument("--singular", help="singular of NAME, if it is irregular")
    added[token].add_argument("--email", help="email address of the user, who is signed up if new")
    return parser


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a port (0 to 65535)")


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
