"""The workloads: requests to every server, and the expected responses."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

# As long as the seeded tasks, so that the size of a page does not change.
NEW_TASK = {
    "title": "Buy milk and bread",
    "description": "Two litres",
    "priority": "high",
    "due_at": "2030-01-01T18:00:00Z",
}


@dataclass(frozen=True)
class Person:
    """A calling user: the token and some of the user's tasks."""

    token: str
    tasks: Sequence[UUID]


@dataclass(frozen=True)
class Request:
    """One HTTP request, independent of the load generator."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: str = ""

    @property
    def text(self) -> str:
        """The request as sent over the connection (RFC 9112)."""
        length = {"Content-Length": str(len(self.body.encode()))} if self.body else {}
        headers = {"Host": "127.0.0.1"} | dict(self.headers) | length
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", self.body])


@dataclass(frozen=True)
class Workload:
    """Requests that a load generator sends in rotation; neighbours belong to different users.

    fits: whether a response body is the expected one.
    """

    name: str
    title: str
    status: int
    requests: Callable[[Sequence[Person]], list[Request]]
    fits: Callable[[Any], bool]


def bearer(person: Person) -> dict[str, str]:
    """The authorization header (RFC 6750)."""
    return {"Authorization": f"Bearer {person.token}"}


def _list(people: Sequence[Person]) -> list[Request]:
    return [Request("GET", "/api/v1/tasks?limit=20", bearer(person)) for person in people]


def _one(people: Sequence[Person]) -> list[Request]:
    rounds = zip(*(person.tasks for person in people), strict=True)
    return [
        Request("GET", f"/api/v1/tasks/{task}", bearer(person))
        for tasks in rounds
        for person, task in zip(people, tasks, strict=True)
    ]


def _create(people: Sequence[Person]) -> list[Request]:
    body = json.dumps(NEW_TASK)
    return [
        Request("POST", "/api/v1/tasks", bearer(person) | {"Content-Type": "application/json"}, body)
        for person in people
    ]


def _refused(_: Sequence[Person]) -> list[Request]:
    return [Request("GET", "/api/v1/tasks?limit=20", {})]


def _is_page(body: Any) -> bool:
    return len(body["items"]) == 20 and bool(body["next_cursor"])


LIST = Workload("list", "GET /api/v1/tasks?limit=20", 200, _list, _is_page)
ONE = Workload("one", "GET /api/v1/tasks/{id}", 200, _one, lambda body: body["version"] == 1)
REFUSED = Workload("refused", "GET /api/v1/tasks without a token", 401, _refused, lambda body: "detail" in body)
CREATE = Workload("create", "POST /api/v1/tasks", 201, _create, lambda body: body["title"] == NEW_TASK["title"])

# Writes come last; their tasks are deleted before the next server's turn.
WORKLOADS = (LIST, ONE, REFUSED, CREATE)
