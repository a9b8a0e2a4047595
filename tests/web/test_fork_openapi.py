"""The OpenAPI document of a fork: it describes routes of any kind, and what they answer."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.models import OpenAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, RootModel

from backend.app import create_app
from backend.auth.testing import LocalIssuer
from backend.docs_pages import routes_page
from backend.settings import Settings
from backend.users.auth import Person
from backend.users.caller import CallerRoute
from backend.web.requests import MERGE_PATCH
from tests.conftest import running

VALIDATION_ERROR = "#/components/schemas/HTTPValidationError"
PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


class Name(RootModel[str]):
    model_config = ConfigDict(json_schema_extra={"examples": ["a"]})


class Strict(BaseModel):
    """Its example lacks two required members, of which one may be null."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "a"}]})

    name: str
    size: int
    note: str | None


class Named(BaseModel):
    name: str


class Problem(BaseModel):
    """A model of a fork with the name of ours."""

    reason: str


class Filters(BaseModel):
    size: int = Field(default=1, ge=1)


router = APIRouter()
callbacks = APIRouter()


@callbacks.post("{$request.body.callback_url}", name="notify")
async def notify(body: Named) -> None: ...


@router.patch("/patch/nothing")
async def patch_nothing() -> None: ...


def form(kind: str) -> dict[str, Any]:
    """What FastAPI writes of a form, which it can only read with a package that the project does not need."""
    return {"requestBody": {"content": {kind: {"schema": {"$ref": "#/components/schemas/Named"}}}}}


@router.patch("/patch/form", openapi_extra=form("application/x-www-form-urlencoded"))
async def patch_form(request: Request) -> int:
    return len(await request.body())


@router.patch("/patch/file", openapi_extra=form("multipart/form-data"))
async def patch_file(request: Request) -> int:
    return len(await request.body())


@router.patch("/patch/text")
async def patch_text(text: Annotated[str, Body(media_type="text/plain")]) -> str:
    return text


@router.patch("/patch/root")
async def patch_root(name: Name) -> Name:
    return name


@router.post("/strict/{id}")
async def strict(id: int, body: Strict, named: Named) -> Strict:
    return body.model_copy(update={"size": id, "name": named.name})


@router.get("/plain/{size}")
async def plain(size: int, limit: int = 1) -> int:
    return size + limit


@router.get("/own-422/{size}", responses={422: {"model": Named}})
async def own_422(size: int) -> int:
    return size


@router.delete("/no-content", status_code=204)
async def no_content() -> None: ...


@router.get("/text", response_class=PlainTextResponse)
async def text() -> str:
    return "text"


@router.get("/moved", response_class=Response, responses={301: {"description": "Moved"}, "default": {"model": Problem}})
async def moved() -> Response:
    return Response(status_code=301)


@router.get(
    "/references",
    responses={
        200: {"headers": {"X-Shared": {"$ref": "#/components/headers/X-Request-ID"}, "X!": {"schema": {}}}},
        503: {"$ref": "#/components/responses/Unavailable", "description": "Unavailable"},
    },
    openapi_extra={"parameters": [{"$ref": "#/components/parameters/Page"}]},
)
async def references() -> None: ...


@router.post("/callbacks", callbacks=callbacks.routes)
async def with_callbacks(body: Named) -> None: ...


@router.api_route("/methods", methods=["GET", "HEAD", "OPTIONS"])
async def methods(request: Request) -> str:
    return request.method


def duplicate(router: APIRouter) -> None:
    @router.get(f"/duplicate/{len(router.routes)}")
    async def list_tasks() -> None: ...


duplicate(router)
duplicate(router)

personal = APIRouter(route_class=CallerRoute, prefix="/personal")


@personal.get("/filtered")
async def filtered(_: Person, filters: Annotated[Filters, Query()]) -> int:
    return filters.size


@personal.get("/plain")
async def personal_plain(_: Person, note: Annotated[str, Header()] = "") -> None: ...


@personal.patch("/named")
async def patch_named(_: Person, body: Named) -> Named:
    return body


@personal.patch("/nothing")
async def patch_nothing_of_ours(_: Person) -> None: ...


def add_routes(app: FastAPI) -> None:
    app.include_router(router)
    app.include_router(personal)
    app.webhooks.post("created")(notify)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    app = create_app()
    add_routes(app)
    document: dict[str, Any] = json.loads(json.dumps(app.openapi()))
    return document


def references_in(node: Any) -> Iterator[str]:
    for child in node if isinstance(node, list) else node.values() if isinstance(node, dict) else ():
        yield from references_in(child)
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    OpenAPI.model_validate(document)
    of_the_fork = {"#/components/responses/Unavailable", "#/components/parameters/Page"}  # which it adds itself
    for reference in set(references_in(document)) - of_the_fork:
        target: Any = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_operation_ids_are_unique_and_ours_keep_theirs(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))
    assert document["paths"]["/api/v1/tasks"]["get"]["operationId"] == "list_tasks"


@pytest.mark.parametrize("path", ["/plain/{size}", "/strict/{id}", "/patch/text", "/personal/filtered"])
def test_invalid_requests_are_documented_as_problems(document: dict[str, Any], path: str) -> None:
    (operation,) = document["paths"][path].values()
    (kind,) = operation["responses"]["422"]["content"]
    assert kind == "application/problem+json"


async def test_a_plain_route_answers_as_documented(
    settings: Settings, issuer: LocalIssuer, document: dict[str, Any]
) -> None:
    async with running(settings, issuer, change=add_routes) as fork:
        assert (await fork.http.get("/openapi.json")).json() == document
        answer = await fork.http.get("/plain/many")
    documented = document["paths"]["/plain/{size}"]["get"]["responses"]["422"]["content"]
    assert answer.status_code == 422
    assert answer.headers["content-type"] in documented
    (media,) = documented.values()
    schema = document["components"]["schemas"][media["schema"]["$ref"].rpartition("/")[2]]
    assert set(schema["required"]) <= answer.json().keys() <= schema["properties"].keys()


def test_a_route_documents_its_own_422(document: dict[str, Any]) -> None:
    content = document["paths"]["/own-422/{size}"]["get"]["responses"]["422"]["content"]
    assert content == {"application/json": {"schema": {"$ref": "#/components/schemas/Named"}}}


def test_requests_of_others_keep_their_schema(document: dict[str, Any]) -> None:
    """Webhooks and callbacks describe what other servers answer."""
    webhook = document["webhooks"]["created"]["post"]
    callback = document["paths"]["/callbacks"]["post"]["callbacks"]["notify"]["{$request.body.callback_url}"]["post"]
    for operation in webhook, callback:
        assert set(references_in(operation["responses"]["422"])) == {VALIDATION_ERROR}
        assert "headers" not in operation["responses"]["200"]


def test_patch_is_a_merge_patch_on_our_routes_alone(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert set(paths["/personal/named"]["patch"]["requestBody"]["content"]) == set(MERGE_PATCH)
    assert list(paths["/patch/root"]["patch"]["requestBody"]["content"]) == ["application/json"]
    for path in "/patch/nothing", "/personal/nothing":
        assert "requestBody" not in paths[path]["patch"]


def test_a_parameter_named_id_keeps_its_type(document: dict[str, Any]) -> None:
    (parameter,) = document["paths"]["/strict/{id}"]["post"]["parameters"]
    assert parameter["schema"]["type"] == "integer"


def test_examples_get_null_only_where_it_is_allowed(document: dict[str, Any]) -> None:
    assert document["components"]["schemas"]["Strict"]["examples"] == [{"name": "a", "note": None}]


def test_a_route_of_ours_that_cannot_be_invalid_documents_no_422(document: dict[str, Any]) -> None:
    assert "422" not in document["paths"]["/personal/plain"]["get"]["responses"]


async def test_an_own_handler_of_invalid_requests_keeps_the_schema_of_fastapi() -> None:
    app = create_app()
    app.add_exception_handler(RequestValidationError, lambda _, __: JSONResponse({"detail": []}, 422))
    app.include_router(router)
    responses = app.openapi()["paths"]["/plain/{size}"]["get"]["responses"]
    assert VALIDATION_ERROR in references_in(responses["422"])


def test_routes_that_are_added_later_are_in_the_document() -> None:
    app = create_app()
    assert "/plain/{size}" not in app.openapi()["paths"]
    app.include_router(router)
    document = app.openapi()
    assert VALIDATION_ERROR not in references_in(document["paths"]["/plain/{size}"])
    assert app.openapi() is document


def test_the_page_of_routes_has_routes_without_tags_and_descriptions(document: dict[str, Any]) -> None:
    assert "| `GET /plain/{size}` | Plain | public |" in routes_page(document)
