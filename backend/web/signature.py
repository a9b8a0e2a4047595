"""Reads from the signature of a route which caller its handler takes, dependencies included."""

from collections.abc import Container, Iterator
from typing import Any, TypeVar

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, _effective_route_context_var

T = TypeVar("T")


def effective_dependant(route: APIRoute) -> Dependant:
    """The dependencies of a route while FastAPI makes its handler: also those of its routers and the application.

    Outside of an inclusion: those of the route alone.
    """
    context = _effective_route_context_var.get()
    dependant: Dependant = (
        route.dependant if context is None or context.original_route is not route else context.dependant
    )
    return dependant


def find_dependencies(
    dependant: Dependant, kind: type[T], overridden: Container[Any] = ()
) -> Iterator[tuple[T, frozenset[str]]]:
    """All dependencies of a class, recursively, each with the scopes that `Security` requires of it.

    Without the `overridden` ones and their own dependencies, which FastAPI does not call.
    """
    for each in dependant.dependencies:
        if each.call in overridden:
            continue
        if isinstance(each.call, kind):
            yield each.call, frozenset((*(each.parent_oauth_scopes or ()), *(each.own_oauth_scopes or ())))
        yield from find_dependencies(each, kind, overridden)
