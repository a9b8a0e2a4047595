"""Checks the addresses in the settings for mistakes, without network access."""

from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from backend.doctor.findings import Finding, fail, listed, ok, shown, warn
from backend.settings import Settings

_PORTS = {"http": 80, "https": 443}


def examine_addresses(settings: Settings) -> Iterator[Finding]:
    """Check issuers, audiences, PUBLIC_URL and CORS_ORIGINS."""
    yield ok("issuers", listed(settings.issuers))
    yield ok("audiences", listed(settings.audiences))
    for name in settings.audiences:
        if is_client_id(name):
            yield client_id_listed(name)
    yield _examine_public_url(settings)
    yield from _examine_origins(settings)


def is_client_id(name: str) -> bool:
    """Whether an audience has the form of Better Auth's OAuth client ids: 32 letters or digits."""
    return len(name) == 32 and name.isascii() and name.isalnum()


def client_id_listed(name: str) -> Finding:
    effect = f"{shown(name)} is an OAuth client, so its ID tokens are accepted as access tokens"
    return warn("audiences", f"{effect}: remove it from BETTER_AUTH_AUDIENCES")


def _examine_public_url(settings: Settings) -> Finding:
    public, subject = settings.public_url, "public url"
    if public in (settings.better_auth_url, settings.base_url):
        return warn(subject, f"{public} is Better Auth's address: set PUBLIC_URL to the address of this API")
    if _is_local(public) and not _is_local(settings.better_auth_url):
        return warn(subject, f"{public} works on this machine only: set PUBLIC_URL to the address that clients call")
    if public.startswith("http:") and not _is_local(public):
        return warn(subject, f"{public} sends tokens unencrypted: set PUBLIC_URL to the https address")
    return ok(subject, public)


def _examine_origins(settings: Settings) -> Iterator[Finding]:
    subject, origins = "cors", settings.cors_origins
    page = _origin(settings.better_auth_url)
    if not origins:
        yield ok(subject, f"pages of other origins cannot call the API; to allow {page}, add it to CORS_ORIGINS")
        return
    for origin in origins:
        if origin != _origin(origin):
            yield fail(subject, f"browsers never send {shown(origin)}: write {_origin(origin)} in CORS_ORIGINS")
        elif _is_local(origin) and not _is_local(settings.public_url):
            yield warn(subject, f"{origin} can be any server on a user's machine: remove it from CORS_ORIGINS")
        elif origin.startswith("http:") and not _is_local(origin):
            yield warn(subject, f"an attacker can alter pages of {origin} in transit: use https in CORS_ORIGINS")
    if page not in origins and page != _origin(settings.public_url):
        yield warn(subject, f"pages of Better Auth's {page} cannot call the API: to allow them, add it to CORS_ORIGINS")
    else:
        yield ok(subject, listed(origins))


def _origin(url: str) -> str:
    """The origin as browsers send it: lower case, without the default port (RFC 6454, 6.2)."""
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
