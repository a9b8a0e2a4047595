"""The application mounted in a parent application, behind a path of the server, and with applications mounted in it."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.staticfiles import StaticFiles
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from backend.app import create_app
from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.web.start_up import LifespanNotRun
from tests.conftest import running

ROOT = "/sub"
SOURCE = Path(__file__).read_text()
TASKS = "/api/v1/tasks"
PUBLIC_URL = f"https://example.com{ROOT}"


@dataclass
class Mounted:
    """The application below ROOT, and how a client reaches it."""

    http: httpx.AsyncClient
    bearer: dict[str, str]


def with_lifespan(app: FastAPI, *, forwarded: bool = True) -> Callable[[Any], Any]:
    """The lifespan of a parent, as the documentation shows it."""

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[dict[str, Any]]:
        async with app.router.lifespan_context(app) as state:
            yield {**(state or {}), "parent": "its own state"} if forwarded else {}

    return lifespan


def in_fastapi(app: FastAPI, **options: Any) -> Any:
    parent = FastAPI(lifespan=with_lifespan(app, **options))
    parent.router.routes.append(Route("/.well-known/oauth-protected-resource{rest:path}", app))
    parent.mount(ROOT, app)
    return parent


def in_starlette(app: FastAPI, **options: Any) -> Any:
    metadata = Route("/.well-known/oauth-protected-resource{rest:path}", app)
    return Starlette(routes=[metadata, Mount(ROOT, app)], lifespan=with_lifespan(app, **options))


@asynccontextmanager
async def serving(parent: Any, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """Run the lifespan as a server does, and pass its state on."""
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(parent.router.lifespan_context(parent))

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await parent({**scope, "state": dict(state), "root_path": root_path}, receive, send)

        transport = httpx.ASGITransport(with_state)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="https://example.com"))


@pytest.fixture
def config(settings: Settings, issuer: LocalIssuer) -> Settings:
    audiences = (issuer.audience, PUBLIC_URL)
    return settings.model_copy(
        update={"public_url": PUBLIC_URL, "better_auth_audiences": audiences, "rate_limit": "1000/minute"}
    )


@pytest.fixture(params=["in FastAPI", "in Starlette", "below the path of a server", "behind a proxy that removes it"])
async def mounted(request: pytest.FixtureRequest, config: Settings, issuer: LocalIssuer) -> AsyncIterator[Mounted]:
    app = create_app(config)
    bearer = {"Authorization": f"Bearer {issuer.token(sub='mounted')}"}
    parents = {"in FastAPI": in_fastapi, "in Starlette": in_starlette}
    if request.param in parents:
        async with serving(parents[request.param](app)) as http:
            yield Mounted(http, bearer)
    else:
        async with serving(app, ROOT) as http:
            if "proxy" in request.param:
                http.base_url = httpx.URL("https://example.com")
                http.event_hooks["request"].append(remove_root)
            yield Mounted(http, bearer)


async def remove_root(request: httpx.Request) -> None:
    """As a proxy does for a server that adds nothing to the path (hypercorn)."""
    request.url = request.url.copy_with(raw_path=request.url.raw_path.removeprefix(ROOT.encode()))


async def test_a_mounted_application_answers(mounted: Mounted) -> None:
    http, bearer = mounted.http, mounted.bearer
    assert (await http.get(f"{ROOT}/livez")).json() == {"status": "ok"}
    refused = await http.get(f"{ROOT}{TASKS}")
    assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
    assert "ratelimit" in refused.headers
    assert "ratelimit" not in (await http.get(f"{ROOT}/livez")).headers
    wrong = await http.put(f"{ROOT}{TASKS}", headers=bearer)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
    head = await http.head(f"{ROOT}{TASKS}", headers=bearer)
    assert (head.status_code, head.content) == (200, b"")


async def test_addresses_in_responses_lead_back(mounted: Mounted) -> None:
    http, bearer = mounted.http, mounted.bearer
    made = [await http.post(f"{ROOT}{TASKS}", json={"title": "a"}, headers=bearer) for _ in range(2)]
    for answer in made:
        assert answer.headers["location"] == f"{ROOT}{TASKS}/{answer.json()['id']}"
        assert (await http.get(answer.headers["location"], headers=bearer)).json() == answer.json()
    id = "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"
    put = await http.put(f"{ROOT}{TASKS}/{id}", json={"title": "b"}, headers=bearer)
    assert put.headers.get("location", f"{ROOT}{TASKS}/{id}") == f"{ROOT}{TASKS}/{id}"
    page = await http.get(f"{ROOT}{TASKS}?limit=1", headers=bearer)
    link = page.links["next"]["url"]
    assert link.startswith(f"{ROOT}{TASKS}?limit=1&")
    assert (await http.get(link, headers=bearer)).status_code == 200


async def test_the_documentation_is_found(mounted: Mounted) -> None:
    service = (await mounted.http.get(f"{ROOT}/")).json()
    docs = await mounted.http.get(service["docs"])
    assert f"url: '{ROOT}/openapi.json'" in docs.text
    assert "default-src" not in docs.headers["content-security-policy"]
    document = (await mounted.http.get(service["openapi"])).json()
    assert document["servers"] == [{"url": ROOT}]
    assert TASKS in document["paths"]


@pytest.mark.parametrize("parent", [in_fastapi, in_starlette])
async def test_the_parent_passes_requests_for_the_metadata_on(config: Settings, parent: Callable[..., Any]) -> None:
    async with serving(parent(create_app(config))) as http:
        challenge = (await http.get(f"{ROOT}{TASKS}")).headers["www-authenticate"]
        address = f"https://example.com/.well-known/oauth-protected-resource{ROOT}"
        assert f'resource_metadata="{address}"' in challenge
        metadata = (await http.get(address)).json()
        assert metadata["resource"] == PUBLIC_URL
        assert "tasks:read" in metadata["scopes_supported"]


@pytest.mark.parametrize("parent", [in_fastapi, in_starlette])
async def test_without_the_lifespan_the_error_says_how_to_run_it(config: Settings, parent: Callable[..., Any]) -> None:
    async with serving(parent(create_app(config), forwarded=False)) as http:
        assert (await http.get(f"{ROOT}/livez")).status_code == 200
        with pytest.raises(LifespanNotRun, match=r"app\.router\.lifespan_context\(app\)"):
            await http.get(f"{ROOT}{TASKS}")


async def test_a_fork_adds_a_lifespan_and_state(settings: Settings, issuer: LocalIssuer) -> None:
    """FastAPI composes the lifespans of routers; names of ours keep their value."""
    events = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        events.append("started")
        yield {"mine": "of the fork", "settings": "not ours"}
        events.append("stopped")

    added = APIRouter(lifespan=lifespan)

    @added.get("/mine")
    async def mine(request: Request) -> list[object]:
        return [request.state.mine, request.app.state.shared, isinstance(request.state.settings, Settings)]

    def change(app: FastAPI) -> None:
        app.include_router(added)
        app.state.shared = "of the application"

    async with running(settings, issuer, change=change) as api:
        assert (await api.http.get("/mine")).json() == ["of the fork", "of the application", True]
        assert (await api.person().get(TASKS)).status_code == 200
        assert events == ["started"]
    assert events == ["started", "stopped"]


async def test_a_mounted_third_party_application_has_all_middleware(settings: Settings, issuer: LocalIssuer) -> None:
    config = settings.model_copy(update={"trusted_hosts": ("localhost",), "rate_limit": "3/minute"})

    def change(app: FastAPI) -> None:
        app.mount("/static", StaticFiles(directory=Path(__file__).parent))

    async with running(config, issuer, change=change) as api:
        address = f"/static/{Path(__file__).name}"
        headers = {"Origin": "https://app.example.com", "Accept-Encoding": "gzip"}
        answer = await api.http.get(address, headers=headers)
        assert answer.status_code == 200
        assert answer.text == SOURCE
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "private, no-cache"
        assert "ratelimit" in answer.headers
        known = await api.http.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert (known.status_code, known.content) == (304, b"")
        assert (await api.http.get(address, headers={"Host": "evil.example"})).status_code == 400
        assert (await api.http.get(address, headers={"Range": "bytes=0-2"})).text == '"""'
        assert (await api.http.get(address)).status_code == 429
