"""OAuth 2.0 protected resource metadata (RFC 9728)."""

from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field

from backend.auth import Requirement
from backend.web.problems import NotFound
from backend.web.signature import find_dependencies

_WELL_KNOWN = "/.well-known/oauth-protected-resource"

router = APIRouter(tags=["service"])


def url(public_url: str) -> str:
    """The address of the metadata of the resource `public_url` (RFC 9728, section 3.1)."""
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}{_WELL_KNOWN}{parts.path}"


def scopes(app: FastAPI) -> set[str]:
    """All scopes that the signatures of routes require of OAuth access tokens."""
    dependants = (getattr(context, "dependant", None) for context in iter_route_contexts(app.routes))
    found = (each for dependant in dependants if dependant for each in find_dependencies(dependant, Requirement))
    return {scope for requirement, scopes in found for scope in (*requirement.scopes, *scopes)}


class ResourceMetadata(BaseModel):
    """Protected resource metadata (RFC 9728, section 2)."""

    resource: str = Field(description="Identifier of this API; the audience of its tokens")
    authorization_servers: list[str] = Field(description="Issuers of accepted OAuth access tokens")
    bearer_methods_supported: list[str] = Field(description="Accepted ways to send a token")
    scopes_supported: list[str] = Field(description="Scopes used by this API")
    resource_name: str = Field(description="Name for people")


@router.get(_WELL_KNOWN, summary="Protected resource metadata")
async def get_resource_metadata(request: Request) -> ResourceMetadata:
    """The authorization servers and scopes of this API (RFC 9728), built from the settings alone."""
    settings = request.state.settings
    issuers = settings.issuers
    return ResourceMetadata(
        resource=settings.public_url,
        # OAuth tokens have the base address as issuer; without it among the issuers, only `/token` JWTs are accepted.
        authorization_servers=[settings.base_url if settings.base_url in issuers else issuers[0]],
        bearer_methods_supported=["header"],
        scopes_supported=sorted(scopes(request.app)),
        resource_name=request.app.title,
    )


@router.get(_WELL_KNOWN + "{path:path}", include_in_schema=False)
async def get_resource_metadata_below(request: Request, path: str) -> ResourceMetadata:
    """The metadata of a resource whose identifier has a path (RFC 9728, section 3.1)."""
    if path != urlsplit(request.state.settings.public_url).path:
        raise NotFound
    return await get_resource_metadata(request)
