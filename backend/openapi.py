"""What FastAPI cannot say of this API in its OpenAPI document, or says wrongly."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from backend.bodies import MERGE_PATCH
from backend.problems import Problem

# When an operation answers what.
DESCRIPTIONS = {
    400: "The Authorization header is malformed.",
    401: "There is no token, or it is refused; `WWW-Authenticate` says why.",
    403: "The token lacks a scope, or speaks for nobody who may do this.",
    404: "There is no such thing, or it is not the caller's.",
    409: "It exists already, or the request is being worked on.",
    412: "The version is not one that If-Match names.",
    413: "The body is too long.",
    415: "The body is of another content type.",
    422: "The request does not make sense; `errors` names each member that is wrong.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    500: "A defect here.",
    503: "Keys or database cannot be reached; `Retry-After` says when to ask again.",
}


def responses(*statuses: int, headers: Mapping[int, Any] = MappingProxyType({})) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route or router: the problems it may answer with, and the headers of its good answers."""
    good: dict[int | str, dict[str, Any]] = {status: {"headers": names} for status, names in headers.items()}
    return good | {status: {"description": DESCRIPTIONS[status], "model": Problem} for status in statuses}


def mended(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its problems, patches and examples put right, in place."""
    schemas = document["components"]["schemas"]
    for operations in document["paths"].values():
        for method, operation in operations.items():
            _name_problems(operation["responses"])
            if method == "patch":
                content = operation["requestBody"]["content"]
                content |= dict.fromkeys(MERGE_PATCH, content["application/json"])
    for unused in "HTTPValidationError", "ValidationError":
        schemas.pop(unused, None)
    for schema in schemas.values():
        for example in schema.get("examples", ()):
            # FastAPI leaves out what is null, also where it must be there.
            example |= dict.fromkeys(name for name in schema.get("required", ()) if name not in example)
    return document


def _name_problems(answers: dict[str, Any]) -> None:
    """Problems have a media type of their own; FastAPI's own 422 stands only where there can be none."""
    for status, response in list(answers.items()):
        content = response.get("content", {})
        match content.get("application/json", {}).get("schema"):
            case {"$ref": "#/components/schemas/Problem"}:
                content["application/problem+json"] = content.pop("application/json")
            case {"$ref": "#/components/schemas/HTTPValidationError"}:
                del answers[status]
