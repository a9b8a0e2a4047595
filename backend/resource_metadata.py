"""What a client needs to know to get a token for this API (RFC 9728)."""

from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from pydantic import BaseModel

_WELL_KNOWN = "/.well-known/oauth-protected-resource"

router = APIRouter(tags=["service"])


def url(public_url: str) -> str:
    """Where the metadata of the resource `public_url` stand: RFC 9728, section 3.1."""
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}{_WELL_KNOWN}{parts.path}"


class ResourceMetadata(BaseModel):
    """RFC 9728, section 2."""

    resource: str
    authorization_servers: list[str]
    bearer_methods_supported: list[str]
    scopes_supported: list[str]
    resource_name: str


@router.get(_WELL_KNOWN, summary="Protected resource metadata")
async def get_resource_metadata(request: Request) -> ResourceMetadata:
    """Where to get a token for this API (RFC 9728). Every address comes from the settings, none from the request."""
    settings = request.state.settings
    return ResourceMetadata(
        resource=settings.public_url,
        authorization_servers=[settings.issuers[-1]],
        bearer_methods_supported=["header"],
        scopes_supported=["profile", "tasks:read", "tasks:write"],
        resource_name=request.app.title,
    )
