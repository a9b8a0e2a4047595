"""Corrections to the OpenAPI document that FastAPI generates: problems, headers, merge patches, ids and examples."""

import re
from collections.abc import Mapping, Set
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

_METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})
_SCHEMAS = "#/components/schemas/"
_COMPONENT = re.compile(r"[A-Za-z0-9._-]+")

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


def correct(document: dict[str, Any], own: Set[tuple[str, str]], *, problems: bool) -> None:
    """Correct a document in place.

    `own`: path and method of the routes of the application's own class. Others may be of any kind, so the document says
    of them what FastAPI says, and what the middleware adds. `problems`: invalid requests are answered with problems.
    """
    components = document.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    headers: Headers = components.setdefault("headers", {})
    operations = {
        (path, method): operation
        for path, item in document.get("paths", {}).items()
        for method, operation in item.items()
        if method in _METHODS
    }
    for (path, method), operation in operations.items():
        is_own = (path, method) in own
        if problems:
            _correct_invalid(operation, schemas, is_own=is_own)
        if is_own:
            _correct_own(operation, method)
        responses = {status: response for status, response in operation["responses"].items() if "$ref" not in response}
        for response in responses.values():
            _correct_problem(response, schemas)
        _add_headers(responses, headers, limited=path.startswith("/api/"))
    _correct_ids(operations, own)
    for schema in schemas.values():
        _correct_examples(schema)
    for unused in "HTTPValidationError", "ValidationError":
        if f"{_SCHEMAS}{unused}" not in _references(document):
            schemas.pop(unused, None)


def _correct_own(operation: dict[str, Any], method: str) -> None:
    for parameter in operation.get("parameters", ()):
        if _is_id(parameter):
            parameter |= _ID
    content = operation.get("requestBody", {}).get("content", {})
    if method == "patch" and "application/json" in content:
        content |= dict.fromkeys(MERGE_PATCH, content["application/json"])


def _correct_invalid(operation: dict[str, Any], schemas: dict[str, Any], *, is_own: bool) -> None:
    """Replace FastAPI's own 422 by the problem that is sent instead, or remove it from a route that never sends one."""
    responses = operation["responses"]
    if f"{_SCHEMAS}HTTPValidationError" not in _references(responses.get("422")):
        return
    if is_own and "requestBody" not in operation and not any(map(_can_be_invalid, operation.get("parameters", ()))):
        del responses["422"]
        return
    if "Problem" not in schemas:
        problem = Problem.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}", mode="serialization")
        schemas |= problem.pop("$defs") | {"Problem": problem}
    content = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}Problem"}}}
    responses["422"] = {"description": DESCRIPTIONS[422], "content": content}


def _can_be_invalid(parameter: dict[str, Any]) -> bool:
    """Whether a value may fail validation. An optional text without limits cannot; an `id` is checked by its path."""
    is_text = parameter.get("schema", {}).get("type") == "string"
    has_limits = parameter.get("schema", {}).keys() & {"minLength", "maxLength", "pattern", "format", "enum", "const"}
    return not _is_id(parameter) and not (is_text and not has_limits and not parameter.get("required"))


def _is_id(parameter: dict[str, Any]) -> bool:
    return (parameter.get("in"), parameter.get("name")) == ("path", "id")


def _correct_problem(response: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Give a problem its media type: FastAPI uses the one of the route's response class."""
    content = response.get("content", {})
    for kind, media in list(content.items()):
        match media.get("schema"):
            case {"$ref": str(reference)}:
                # FastAPI renames models of the same name, so the members identify a problem.
                schema = schemas.get(reference.removeprefix(_SCHEMAS), {})
                if schema.get("properties", {}).keys() == Problem.model_fields.keys():
                    content["application/problem+json"] = content.pop(kind)


def _correct_ids(operations: dict[tuple[str, str], Any], own: Set[tuple[str, str]]) -> None:
    """Make operation ids unique: of two, one gets path and method, as FastAPI's own have. `own` keeps its ids."""
    seen = set()
    for path, method in sorted(operations, key=lambda operation: operation not in own):
        operation = operations[path, method]
        if operation["operationId"] in seen:
            operation["operationId"] = re.sub(r"\W", "_", f"{operation['operationId']}{path}_{method}")
        seen.add(operation["operationId"])


def _correct_examples(schema: dict[str, Any]) -> None:
    """Add members that are required and may be null: FastAPI omits null from examples."""
    nullable = [name for name in schema.get("required", ()) if _is_nullable(schema.get("properties", {}).get(name))]
    for example in schema.get("examples", ()):
        if isinstance(example, dict):
            example |= dict.fromkeys(name for name in nullable if name not in example)


def _is_nullable(schema: Any) -> bool:
    return isinstance(schema, dict) and {"type": "null"} in schema.get("anyOf", ())


def _references(node: Any) -> set[str]:
    """All references in a part of a document."""
    if isinstance(node, list):
        return set().union(*map(_references, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(_references, node.values()))


def _add_headers(responses: dict[str, Any], components: Headers, *, limited: bool) -> None:
    """Add the headers that middleware sets. Each header is described once, among the components."""
    for status, response in responses.items():
        headers = _ALWAYS | (_RATE if limited else {}) | response.get("headers", {})
        if "application/problem+json" in response.get("content", {}):
            headers |= _OF_PROBLEMS.get(status, {})
        response["headers"] = {
            name: {"$ref": f"#/components/headers/{name}"} if _is_shared(components, name, header) else header
            for name, header in headers.items()
        }


def _is_shared(components: Headers, name: str, header: dict[str, Any]) -> bool:
    """Whether the component `name` describes this header; if there is none, it becomes one."""
    is_sharable = "$ref" not in header and _COMPONENT.fullmatch(name) is not None
    return is_sharable and components.setdefault(name, header) == header
