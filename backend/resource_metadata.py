"""What a client needs to know to get a token for this API (RFC 9728)."""

from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Request

_WELL_KNOWN = "/.well-known/oauth-protected-resource"

router = APIRouter(tags=["health"])


def url(public_url: str) -> str:
    """Where the metadata of the resource `public_url` stand: RFC 9728, section 3.1."""
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}{_WELL_KNOWN}{parts.path}"


@router.get(_WELL_KNOWN, summary="Protected resource metadata")
async def get_resource_metadata(request: Request) -> dict[str, Any]:
    """RFC 9728, section 2. Every address comes from the settings, none from the request."""
    settings = request.state.settings
    return {
        "resource": settings.public_url,
        "authorization_servers": [settings.issuers[-1]],
        "bearer_methods_supported": ["header"],
        "scopes_supported": ["profile", "tasks:read", "tasks:write"],
        "resource_name": request.app.title,
    }
