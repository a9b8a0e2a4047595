"""Corrections to the OpenAPI document that FastAPI generates: problems, headers, merge patches, ids and examples."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from backend.web.problems import Problem
from backend.web.requests import MERGE_PATCH

# Descriptions of the error responses.
DESCRIPTIONS = {
    400: "The Authorization header is malformed.",
    401: "The token is missing or invalid; `WWW-Authenticate` gives the reason.",
    403: "The token lacks a scope, or its subject is not allowed to perform this operation.",
    404: "The resource does not exist or belongs to another user.",
    409: "The resource already exists, or the same request is still being processed.",
    410: "The sync token is too old.",
    412: "The current version does not satisfy If-Match or If-None-Match.",
    408: "The request body was not received in time.",
    413: "The request body is too large.",
    415: "The content type or encoding of the request body is not supported.",
    422: "The request is invalid; `errors` lists the invalid members.",
    429: "Too many requests; retry after `Retry-After` seconds.",
    500: "Unexpected server error.",
    503: "The issuer's keys or the database are unavailable; retry after `Retry-After` seconds.",
}

Headers = dict[str, dict[str, Any]]

_ALWAYS: Headers = {
    "X-Request-ID": {
        "description": "The request id, as in the log: the one that the client sent, or a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Cache-Control": {
        "description": "`private, no-cache` for responses with an ETag, otherwise `no-store`.",
        "required": True,
        "schema": {"type": "string"},
    },
}
_RATE: Headers = {
    "RateLimit-Policy": {
        "description": "The quota and its window in seconds (draft-ietf-httpapi-ratelimit-headers).",
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": "The remaining quota, and the seconds until it is reset.",
        "schema": {"type": "string"},
    },
}
_RETRY: Headers = {
    "Retry-After": {
        "description": "Seconds to wait before the next attempt.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}
_CHALLENGE: Headers = {
    "WWW-Authenticate": {
        "description": "The error of the token (RFC 6750, section 3) and the URL of the metadata (RFC 9728).",
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

# The path parameter `id` of every route.
_ID = {
    "description": "The id of the resource, a UUID. Any other text results in a 404.",
    "schema": {"type": "string", "format": "uuid", "examples": ["019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f"]},
}


def responses(*statuses: int, headers: Mapping[int, Any] = MappingProxyType({})) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: a problem for each of `statuses`, and `headers` by successful status."""
    if 413 in statuses:  # the route reads a body
        statuses = (408, *statuses)
    successful: dict[int | str, dict[str, Any]] = {status: {"headers": names} for status, names in headers.items()}
    return successful | {status: {"description": DESCRIPTIONS[status], "model": Problem} for status in statuses}


def corrected(document: dict[str, Any]) -> dict[str, Any]:
    """Correct the document in place and return it."""
    schemas = document["components"]["schemas"]
    headers: Headers = document["components"].setdefault("headers", {})
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _correct_problems(operation["responses"])
            _add_headers(operation["responses"], headers, limited=path.startswith("/api/"))
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
            # FastAPI omits null from examples, even for required members.
            example |= dict.fromkeys(name for name in schema.get("required", ()) if name not in example)
    return document


def _correct_problems(responses: dict[str, Any]) -> None:
    """Give problems their media type, and remove FastAPI's own 422, which this API never sends."""
    for status, response in list(responses.items()):
        content = response.get("content", {})
        for kind, media in list(content.items()):  # FastAPI uses the response class of the route for problems, too
            match media.get("schema"):
                case {"$ref": "#/components/schemas/Problem"}:
                    content["application/problem+json"] = content.pop(kind)
                case {"$ref": "#/components/schemas/HTTPValidationError"}:
                    del responses[status]


def _add_headers(responses: dict[str, Any], components: Headers, *, limited: bool) -> None:
    """Add the headers that middleware sets. Each header is described once, among the components."""
    for status, response in responses.items():
        headers = _ALWAYS | (_RATE if limited else {}) | response.get("headers", {})
        if "application/problem+json" in response.get("content", {}):
            headers |= _OF_PROBLEMS.get(status, {})
        response["headers"] = {
            name: {"$ref": f"#/components/headers/{name}"} if components.setdefault(name, header) == header else header
            for name, header in headers.items()
        }
