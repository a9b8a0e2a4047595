"""The routes of /api/v1/admin, for users with the role `admin`."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from backend.auth import CurrentPrincipal
from backend.database import SYSTEM, Database
from backend.resources import pagination
from backend.resources.responses import Answer
from backend.users.caller import REFUSALS, require_role
from backend.web import openapi
from backend.web.request_state import request_state

from .schemas import AuditPage, AuditQuery, AuditRead, UserPage, UserQuery, UserRead
from .service import AdminService
from .statements import ADMIN_ROLE, AUDIT, USERS

router = APIRouter(prefix="/api/v1/admin", tags=["users"], route_class=require_role(ADMIN_ROLE), responses=REFUSALS)


async def admin_service(request: Request, principal: CurrentPrincipal) -> AdminService:
    state, database = request_state(request.scope), Database(request.state.pool, SYSTEM)
    return AdminService(database, request.state.users, state.caller.id, principal, state.request_id)


Admin = Annotated[AdminService, Depends(admin_service)]

user_response, users_response = Answer(UserRead), Answer(UserRead, many=True)
audit_response = Answer(AuditRead, many=True)


@router.get("/users", response_model=UserPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_users(request: Request, admin: Admin, query: Annotated[UserQuery, Query()]) -> Response:
    """List all users, newest first."""
    page = await admin.list(USERS, query)
    return users_response(page, headers=pagination.link(request, page["next_cursor"]))


@router.get("/users/{id:uuid}", response_model=UserRead, responses=openapi.responses(404))
async def get_user(admin: Admin, id: UUID) -> Response:
    """Get a user."""
    return user_response(await admin.get(id))


@router.post("/users/{id:uuid}/suspend", response_model=UserRead, responses=openapi.responses(404, 409))
async def suspend_user(admin: Admin, id: UUID) -> Response:
    """Suspend a user: all their requests are refused from now on. Suspending twice is not an error."""
    return user_response(await admin.suspend(id))


@router.post("/users/{id:uuid}/reinstate", response_model=UserRead, responses=openapi.responses(404, 409))
async def reinstate_user(admin: Admin, id: UUID) -> Response:
    """End the suspension of a user. A ban at Better Auth stays in force. Reinstating twice is not an error."""
    return user_response(await admin.reinstate(id))


@router.get("/audit", response_model=AuditPage, responses=openapi.responses(422, headers={200: pagination.LINK}))
async def list_audit(request: Request, admin: Admin, query: Annotated[AuditQuery, Query()]) -> Response:
    """List the audit log of actions on accounts, newest first."""
    page = await admin.list(AUDIT, query)
    return audit_response(page, headers=pagination.link(request, page["next_cursor"]))
