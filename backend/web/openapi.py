"""What FastAPI cannot say of this API in its OpenAPI document, or says wrongly."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from backend.web.problems import Problem
from backend.web.requests import MERGE_PATCH

# When an operation answers what.
DESCRIPTIONS = {
    400: "The Authorization header is malformed.",
    401: "There is no token, or it is refused; `WWW-Authenticate` says why.",
    403: "The token lacks a scope, or speaks for nobody who may do this.",
    404: "There is no such thing, or it is not the caller's.",
    409: "It exists already, or the request is being worked on.",
    410: "What was deleted since then is forgotten.",
    412: "The version is not one that If-Match names.",
    408: "The body took too long to arrive.",
    413: "The body is too long.",
    415: "The body is of another content type.",
    422: "The request does not make sense; `errors` names each member that is wrong.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    500: "A defect here.",
    503: "Keys or database cannot be reached; `Retry-After` says when to ask again.",
}

Headers = dict[str, dict[str, Any]]

_ALWAYS: Headers = {
    "X-Request-ID": {
        "description": "The id of the request: the client's own, if it sent one, else a new one. The log has it, too.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Cache-Control": {
        "description": "`no-store`; or `private, no-cache`, if there is an ETag to ask again with.",
        "required": True,
        "schema": {"type": "string"},
    },
}
_RATE: Headers = {
    "RateLimit-Policy": {
        "description": "How often one may ask (draft-ietf-httpapi-ratelimit-headers).",
        "schema": {"type": "string"},
    },
    "RateLimit": {"description": "What is left of that, and until when.", "schema": {"type": "string"}},
}
_RETRY: Headers = {
    "Retry-After": {
        "description": "In how many seconds to ask again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
_CHALLENGE: Headers = {
    "WWW-Authenticate": {
        "description": "What is wrong with the token (RFC 6750, section 3), and where to get one (RFC 9728).",
        "schema": {"type": "string"},
    }
}
_OF_PROBLEMS: dict[str, Headers] = {
    "400": _CHALLENGE,
    "401": _CHALLENGE,
    "403": _CHALLENGE,
    "429": _RETRY,
    "503": _RETRY,
}

# Of each parameter that is called `id` and stands in a path.
_ID = {
    "description": "A UUID, as the collection shows it. Whatever else it is, it is a 404.",
    "schema": {"type": "string", "format": "uuid", "examples": ["019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"]},
}


def responses(*statuses: int, headers: Mapping[int, Any] = MappingProxyType({})) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route or router: the problems it may answer with, and the headers of its good answers."""
    if 413 in statuses:  # where a body is read at all
        statuses = (408, *statuses)
    good: dict[int | str, dict[str, Any]] = {status: {"headers": names} for status, names in headers.items()}
    return good | {status: {"description": DESCRIPTIONS[status], "model": Problem} for status in statuses}


def mended(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its problems, headers, patches, ids and examples put right, in place."""
    schemas = document["components"]["schemas"]
    headers: Headers = document["components"].setdefault("headers", {})
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _name_problems(operation["responses"])
            _name_headers(operation["responses"], headers, limited=path.startswith("/api/"))
            for parameter in operation.get("parameters", ()):
                if (parameter["in"], parameter["name"]) == ("path", "id"):
                    parameter |= _ID
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
        for kind, media in list(content.items()):  # an answer that is no JSON lends its type to the others
            match media.get("schema"):
                case {"$ref": "#/components/schemas/Problem"}:
                    content["application/problem+json"] = content.pop(kind)
                case {"$ref": "#/components/schemas/HTTPValidationError"}:
                    del answers[status]


def _name_headers(answers: dict[str, Any], components: Headers, *, limited: bool) -> None:
    """Name those that answers carry whoever gives them, and describe each once, among the components."""
    for status, response in answers.items():
        headers = _ALWAYS | (_RATE if limited else {}) | response.get("headers", {})
        if "application/problem+json" in response.get("content", {}):
            headers |= _OF_PROBLEMS.get(status, {})
        response["headers"] = {
            name: {"$ref": f"#/components/headers/{name}"} if components.setdefault(name, header) == header else header
            for name, header in headers.items()
        }
