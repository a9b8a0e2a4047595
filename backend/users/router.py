"""/api/v1/users: HTTP in, HTTP out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from backend.auth import CurrentPrincipal
from backend.database import SYSTEM, Database
from backend.resources.responses import Answer
from backend.users import service
from backend.users.caller import REFUSALS, CallerDatabase, PersonRoute, route_for
from backend.users.export import Lines
from backend.users.schemas import Me, MeUpdate
from backend.users.service import UserService
from backend.web import openapi

router = APIRouter(
    prefix="/api/v1/users",
    tags=["users"],
    route_class=route_for(read="profile", write="profile"),
    responses=REFUSALS,
)
# A client that may know who somebody is may neither take everything away nor erase it.
person_router = APIRouter(prefix="/api/v1/users", tags=["users"], route_class=PersonRoute, responses=REFUSALS)


async def caller_account(database: CallerDatabase, principal: CurrentPrincipal) -> UserService:
    return UserService(database, principal)


Account = Annotated[UserService, Depends(caller_account)]

one = Answer(Me)

# For OpenAPI.
DISPOSITION = {
    "Content-Disposition": {"description": "A name for the file.", "schema": {"type": "string"}},
}


@router.get("/me", response_model=Me)
async def get_me(account: Account) -> Response:
    """The caller: the local row, and how the token was judged."""
    return one(await account.get())


@router.patch("/me", response_model=Me, responses=openapi.responses(413, 415, 422))
async def update_me(account: Account, data: MeUpdate) -> Response:
    """Change what belongs to this API. Name, email, picture and roles are Better Auth's, and changed there."""
    return one(await account.update(data))


@person_router.get("/me/export", response_class=Lines, responses=openapi.responses(404, headers={200: DISPOSITION}))
async def export_me(account: Account) -> Response:
    """Everything that is kept here of the caller, one JSON object a line (NDJSON).

    The first line says what it is; then comes each row, `kind` its table; the last one counts them, and is missing when
    the answer was cut off.
    """
    return await account.export()


@person_router.delete("/me", status_code=204, response_class=Response)
async def erase_me(request: Request, principal: CurrentPrincipal) -> None:
    """Erase everything that is kept here of the caller, at once. The account at Better Auth stays.

    The next request with a token starts anew, under a new id.
    """
    state = request.state
    system = Database(state.pool, SYSTEM)
    await service.erase(system, state.users, principal, state.user.id, state.request_id)
