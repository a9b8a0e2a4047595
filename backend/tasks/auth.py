"""Permissions of the routes of tasks and tags."""

from typing import Annotated

from fastapi import Security

from backend.users.caller import Caller, current_caller

TasksRead = Annotated[Caller, Security(current_caller, scopes=["tasks:read"])]
TasksWrite = Annotated[Caller, Security(current_caller, scopes=["tasks:write"])]
