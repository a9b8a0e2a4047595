"""Whether the addresses in the settings can be meant."""

from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.doctor.tokens import client_id_listed, is_client_id
from backend.settings import Settings

_PORTS = {"http": 80, "https": 443}


def examine_addresses(settings: Settings) -> Iterator[Finding]:
    """What is wrong with them as far as one can see without asking anybody."""
    yield ok("issuers", listed(settings.issuers))
    yield ok("audiences", listed(settings.audiences))
    for name in settings.audiences:
        if is_client_id(name):
            yield client_id_listed(name)
    yield _examine_public_url(settings)
    yield from _examine_origins(settings)


def _examine_public_url(settings: Settings) -> Finding:
    public, subject = settings.public_url, "public url"
    if public in (settings.better_auth_url, settings.base_url):
        return warn(subject, f"{public} is Better Auth's own address: set PUBLIC_URL to that of this API")
    if _is_local(public) and not _is_local(settings.better_auth_url):
        return warn(
            subject, f"{public} is known to this machine alone: set PUBLIC_URL to the address that clients call"
        )
    if public.startswith("http:") and not _is_local(public):
        return warn(subject, f"{public} lets tokens travel in the clear: set PUBLIC_URL to its https address")
    return ok(subject, public)


def _examine_origins(settings: Settings) -> Iterator[Finding]:
    subject, origins = "cors", settings.cors_origins
    page = _origin(settings.better_auth_url)
    if not origins:
        yield ok(subject, f"no page of another origin may call; if pages of {page} are to, add it to CORS_ORIGINS")
        return
    for origin in origins:
        if origin != _origin(origin):
            yield fail(subject, f"no browser says {shown(origin)}: write {_origin(origin)} in CORS_ORIGINS")
        elif _is_local(origin) and not _is_local(settings.public_url):
            yield warn(subject, f"{origin} is a page of anybody's own machine: take it out of CORS_ORIGINS")
        elif origin.startswith("http:") and not _is_local(origin):
            yield warn(subject, f"{origin} can be changed on its way to the browser: put https into CORS_ORIGINS")
    if page not in origins and page != _origin(settings.public_url):
        yield warn(subject, f"pages of Better Auth's {page} may not call: add it to CORS_ORIGINS if they are to")
    else:
        yield ok(subject, listed(origins))


def _origin(url: str) -> str:
    """As browsers write it: lower case, no port that goes without saying."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, _PORTS[parts.scheme]) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
