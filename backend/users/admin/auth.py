"""Permission of the routes of /api/v1/admin."""

from typing import Annotated, Final

from fastapi import Security

from backend.users.caller import Caller, CallerRequirement

from .statements import ADMIN_ROLE

current_admin: Final = CallerRequirement(role=ADMIN_ROLE)
Admin = Annotated[Caller, Security(current_admin)]
