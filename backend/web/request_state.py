"""What middleware and routes share about one request, as one typed object."""

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from backend.database import Actor
from backend.web.quotas import Decision

# In the scope, not in its `state`: some servers share one state between requests.
_KEY: Final = "resource_server.request"


class AuthenticatedUser(Protocol):
    """The local user row of the caller."""

    @property
    def actor(self) -> Actor: ...


class AuthenticatedCaller(Protocol):
    """The caller, as `backend.users` defines it."""

    @property
    def user(self) -> AuthenticatedUser: ...


@dataclass(slots=True)
class RequestState:
    """The state of one request, from the access log's middleware to the route and back."""

    request_id: str
    started: float  # seconds of `time.perf_counter`, as the next two
    answered: float | None = None  # when the response began
    ended: float = 0.0
    host_allowed: bool = False  # the request has passed the checks of host and origin
    caller: AuthenticatedCaller | None = None  # after authorization
    rate_limit: Decision | None = None  # for the `RateLimit` fields
    status: int | None = None  # of the response, once it has begun
    client_gone: bool = False  # the client disconnected before the end of the response


def begin(scope: MutableMapping[str, Any], request_id: str) -> RequestState:
    """Create the state of a request."""
    state = scope[_KEY] = RequestState(request_id, time.perf_counter())
    return state


def request_state(scope: MutableMapping[str, Any]) -> RequestState:
    """The state of a request. Raises KeyError outside of the access log's middleware."""
    state: RequestState = scope[_KEY]
    return state


def route_path(scope: Mapping[str, Any]) -> str:
    """The path of a request below the address under which the server or a parent application mounts this one."""
    path: str = scope["path"]
    root: str | None = scope.get("root_path")
    if not root:
        return path
    return path[len(root) :] if path.startswith(f"{root}/") else path


def public_path(scope: Mapping[str, Any]) -> str:
    """The path of a request as its client sees it: a proxy may have removed the address that is mounted."""
    root: str = scope.get("root_path", "")
    return f"{root.rstrip('/')}{route_path(scope)}" if root else scope["path"]


def request_id(scope: MutableMapping[str, Any]) -> str | None:
    """The id of a request; None outside of the access log's middleware."""
    state: RequestState | None = scope.get(_KEY)
    return state.request_id if state else None
