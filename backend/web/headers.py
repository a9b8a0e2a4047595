"""Headers of all responses: request id, caching and security policies."""

from collections.abc import Iterable

from starlette.types import Scope

# Swagger UI loads scripts and styles. All other responses are data and may load nothing.
_DOCS = "/docs"
_CSP = b"content-security-policy"
_DOCS_CSP = (_CSP, b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_DATA_CSP = (_CSP, b"default-src 'none'; frame-ancestors 'none'")
# Two years, without includeSubDomains: other hosts below this one may not have TLS.
_HSTS = (b"strict-transport-security", b"max-age=63072000")
_ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_NO_STORE = (b"cache-control", b"no-store")
_NO_CACHE = (b"cache-control", b"private, no-cache")
# A cache must not serve a response to another origin or in another encoding (Fetch, section 3.2.7).
_VARY = (b"vary", b"Accept-Encoding, Origin")


def with_policies(headers: Iterable[tuple[bytes, bytes]], scope: Scope, request_id: str) -> list[tuple[bytes, bytes]]:
    given = dict(headers)
    result = [*headers, (b"x-request-id", request_id.encode()), *_ALWAYS]
    if b"cache-control" not in given:
        result.append(_NO_CACHE if b"etag" in given else _NO_STORE)
    if b"vary" not in given:
        result.append(_VARY)
    else:
        result += [(b"vary", name) for name in (b"Accept-Encoding", b"Origin") if name not in given[b"vary"]]
    if scope["scheme"] == "https":
        result.append(_HSTS)
    result.append(_DOCS_CSP if scope["path"] == _DOCS else _DATA_CSP)
    return result
