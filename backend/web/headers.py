"""Headers of all responses: request id, caching and security policies."""

from collections.abc import Iterable
from functools import lru_cache

from starlette.types import Scope

from backend.web.request_state import route_path

# Swagger UI loads scripts and styles. All other responses are data and may load nothing.
_DOCS = "/docs"
_CSP = b"content-security-policy"
_DOCS_CSP = (_CSP, b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_DATA_CSP = (_CSP, b"default-src 'none'; frame-ancestors 'none'")
# Two years, without includeSubDomains: other hosts below this one may not have TLS.
_HSTS = (b"strict-transport-security", b"max-age=63072000")
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_NO_REFERRER = (b"referrer-policy", b"no-referrer")
_NO_STORE = (b"cache-control", b"no-store")
_NO_CACHE = (b"cache-control", b"private, no-cache")
# A cache must not serve a response to another origin or in another encoding (Fetch, section 3.2.7).
_VARY = (b"vary", b"Accept-Encoding, Origin")
_VARYING = (b"Accept-Encoding", b"Origin")


def with_policies(headers: Iterable[tuple[bytes, bytes]], scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of a response and those that it lacks: a header that the route has set is not added again."""
    result = [*headers]
    given = dict(result)
    if b"x-request-id" not in given:
        result.append((b"x-request-id", request_id.encode()))
    if b"x-content-type-options" not in given:
        result.append(_NOSNIFF)
    if b"referrer-policy" not in given:
        result.append(_NO_REFERRER)
    if b"cache-control" not in given:
        result.append(_NO_CACHE if b"etag" in given else _NO_STORE)
    if b"vary" not in given:
        result.append(_VARY)
    else:
        result += _missing_fields(given[b"vary"])
    if scope["scheme"] == "https" and b"strict-transport-security" not in given:
        result.append(_HSTS)
    if b"content-security-policy" not in given:
        is_docs = _DOCS in scope["path"] and route_path(scope) == _DOCS
        result.append(_DOCS_CSP if is_docs else _DATA_CSP)
    return result


@lru_cache(256)
def _missing_fields(vary: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """`Vary` headers with the fields that `vary` lacks."""
    fields = {field.strip() for field in vary.lower().split(b",")}
    return tuple((b"vary", name) for name in _VARYING if name.lower() not in fields)
