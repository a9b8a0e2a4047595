"""/api/v1/users: HTTP in, HTTP out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from backend import openapi
from backend.answers import Answer
from backend.auth import CurrentPrincipal
from backend.users.caller import REFUSALS, CallerDatabase, route_for
from backend.users.schemas import Me, MeUpdate
from backend.users.service import UserService

router = APIRouter(
    prefix="/api/v1/users",
    tags=["users"],
    route_class=route_for(read="profile", write="profile"),
    responses=REFUSALS,
)


async def caller_account(database: CallerDatabase, principal: CurrentPrincipal) -> UserService:
    return UserService(database, principal)


Account = Annotated[UserService, Depends(caller_account)]

one = Answer(Me)


@router.get("/me", response_model=Me)
async def get_me(account: Account) -> Response:
    """The caller: the local row, and how the token was judged."""
    return one(await account.get())


@router.patch("/me", response_model=Me, responses=openapi.responses(413, 415, 422))
async def update_me(account: Account, data: MeUpdate) -> Response:
    """Change what belongs to this API. Name, email, picture and roles are Better Auth's, and changed there."""
    return one(await account.update(data))
