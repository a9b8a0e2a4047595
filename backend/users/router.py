"""The routes of /api/v1/users/me."""

from fastapi import APIRouter, Request, Response

from backend.database import SYSTEM, Database
from backend.resources.responses import Answer
from backend.users.auth import Person, Profile
from backend.users.caller import REFUSALS, CallerRoute
from backend.users.export import Lines
from backend.users.schemas import Me, MeUpdate
from backend.users.service import UserService, erase
from backend.web import openapi
from backend.web.request_state import request_state

router = APIRouter(prefix="/api/v1/users", tags=["users"], route_class=CallerRoute, responses=REFUSALS)

me_response = Answer(Me)

DISPOSITION = {"Content-Disposition": {"description": "The suggested file name.", "schema": {"type": "string"}}}


@router.get("/me", response_model=Me)
async def get_me(caller: Profile) -> Response:
    """Get the current user: the local account, and the claims of the token."""
    return me_response(await UserService(caller).get())


@router.patch("/me", response_model=Me, responses=openapi.responses(413, 415, 422))
async def update_me(caller: Profile, data: MeUpdate) -> Response:
    """Change the settings stored by this API. Name, email, picture and roles are changed at Better Auth."""
    return me_response(await UserService(caller).update(data))


# An OAuth client with the scope `profile` must neither export nor erase all data.
@router.get("/me/export", response_class=Lines, responses=openapi.responses(404, headers={200: DISPOSITION}))
async def export_me(caller: Person) -> Response:
    """Export all data of the current user as NDJSON, one JSON object per line.

    The first line describes the export. Each row follows, with its table as `kind`. The last line contains the number
    of rows; without it the export is incomplete.
    """
    return await UserService(caller).export()


@router.delete("/me", status_code=204, response_class=Response)
async def erase_me(request: Request, caller: Person) -> None:
    """Erase the current user's account and all its data in this API. The account at Better Auth stays.

    The next request with a token creates a new account with a new id.
    """
    system = Database(request.state.pool, SYSTEM)
    await erase(system, request.state.users, caller, request_state(request.scope).request_id)
