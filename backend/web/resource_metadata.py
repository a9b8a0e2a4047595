"""What a client needs to know to get a token for this API (RFC 9728)."""

from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field

from backend.web.problems import NotFound

_WELL_KNOWN = "/.well-known/oauth-protected-resource"

router = APIRouter(tags=["service"])


def url(public_url: str) -> str:
    """Where the metadata of the resource `public_url` stand: RFC 9728, section 3.1."""
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}{_WELL_KNOWN}{parts.path}"


def scopes(app: FastAPI) -> set[str]:
    """What the routes ask of an OAuth access token."""
    return {scope for route in iter_route_contexts(app.routes) for scope in getattr(route.original_route, "scopes", ())}


class ResourceMetadata(BaseModel):
    """RFC 9728, section 2."""

    resource: str = Field(description="This API: the audience that tokens for it name")
    authorization_servers: list[str] = Field(description="Issuers whose access tokens are taken")
    bearer_methods_supported: list[str] = Field(description="How to send a token")
    scopes_supported: list[str] = Field(description="Scopes that OAuth access tokens need here")
    resource_name: str = Field(description="For people")


@router.get(_WELL_KNOWN, summary="Protected resource metadata")
async def get_resource_metadata(request: Request) -> ResourceMetadata:
    """Where to get a token for this API (RFC 9728). Every address comes from the settings, none from the request."""
    settings = request.state.settings
    issuers = settings.issuers
    return ResourceMetadata(
        resource=settings.public_url,
        # OAuth tokens name the base address; an issuer without it signs `/token` JWTs alone.
        authorization_servers=[settings.base_url if settings.base_url in issuers else issuers[0]],
        bearer_methods_supported=["header"],
        scopes_supported=sorted(scopes(request.app)),
        resource_name=request.app.title,
    )


@router.get(_WELL_KNOWN + "{path:path}", include_in_schema=False)
async def get_resource_metadata_below(request: Request, path: str) -> ResourceMetadata:
    """Where a resource with a path of its own has its metadata (RFC 9728, section 3.1)."""
    if path != urlsplit(request.state.settings.public_url).path:
        raise NotFound
    return await get_resource_metadata(request)
