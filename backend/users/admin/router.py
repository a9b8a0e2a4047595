"""The routes of /api/v1/admin, for users with the role `admin`."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from backend.database import SYSTEM, Database
from backend.resources import pagination
from backend.resources.responses import Answer
from backend.users.caller import REFUSALS, Caller, CallerRoute
from backend.web import openapi
from backend.web.request_state import request_state

from .auth import Admin
from .schemas import AuditPage, AuditQuery, AuditRead, UserPage, UserQuery, UserRead
from .service import AdminService
from .statements import AUDIT, USERS

router = APIRouter(prefix="/api/v1/admin", tags=["users"], route_class=CallerRoute, responses=REFUSALS)

user_response, users_response = Answer(UserRead), Answer(UserRead, many=True)
audit_response = Answer(AuditRead, many=True)


def administration(request: Request, caller: Caller) -> AdminService:
    system = Database(request.state.pool, SYSTEM)
    return AdminService(system, request.state.users, caller, request_state(request.scope).request_id)


@router.get("/users", response_model=UserPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_users(request: Request, caller: Admin, query: Annotated[UserQuery, Query()]) -> Response:
    """List all users, newest first."""
    page = await administration(request, caller).list(USERS, query)
    return users_response(page, headers=pagination.link(request, page["next_cursor"]))


@router.get("/users/{id:uuid}", response_model=UserRead, responses=openapi.responses(404))
async def get_user(request: Request, caller: Admin, id: UUID) -> Response:
    """Get a user."""
    return user_response(await administration(request, caller).get(id))


@router.post("/users/{id:uuid}/suspend", response_model=UserRead, responses=openapi.responses(404, 409))
async def suspend_user(request: Request, caller: Admin, id: UUID) -> Response:
    """Suspend a user: all their requests are refused from now on. Suspending twice is not an error."""
    return user_response(await administration(request, caller).suspend(id))


@router.post("/users/{id:uuid}/reinstate", response_model=UserRead, responses=openapi.responses(404, 409))
async def reinstate_user(request: Request, caller: Admin, id: UUID) -> Response:
    """End the suspension of a user. A ban at Better Auth stays in force. Reinstating twice is not an error."""
    return user_response(await administration(request, caller).reinstate(id))


@router.get("/audit", response_model=AuditPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_audit(request: Request, caller: Admin, query: Annotated[AuditQuery, Query()]) -> Response:
    """List the audit log of actions on accounts, newest first."""
    page = await administration(request, caller).list(AUDIT, query)
    return audit_response(page, headers=pagination.link(request, page["next_cursor"]))
