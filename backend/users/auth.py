"""Permissions of the routes of /api/v1/users/me; `Person` also serves other features."""

from typing import Annotated, Final

from fastapi import Security

from backend.users.caller import Caller, CallerRequirement, current_caller

current_person: Final = CallerRequirement(session_only=True)
# A user with a session token. OAuth access tokens and API keys are refused.
Person = Annotated[Caller, Security(current_person)]
Profile = Annotated[Caller, Security(current_caller, scopes=["profile"])]
