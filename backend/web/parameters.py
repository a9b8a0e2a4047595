"""Parameters of a compiled handler, validated by FastAPI: single values, and models of the query string."""

from collections.abc import Collection
from functools import lru_cache
from types import NoneType
from typing import Any, Final, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from starlette.datastructures import QueryParams

Errors = list[Any]
Values = dict[str, Any]

MAX_QUERIES: Final = 256  # cached for each route
MAX_QUERY: Final = 256  # bytes of a cached query string

ABSENT: Final = object()  # the request has no such parameter
_TEXT: Final = (str, bytes)  # collections, but single values in a request
_EMPTY: Final = (None, tuple, frozenset)  # default factories whose result is the same for every request
_SHAREABLE: Final = (str, int, float, bool, NoneType)


class Unsupported(TypeError):
    """The handler has parameters that only FastAPI can resolve."""


class Field(NamedTuple):
    """A parameter: FastAPI's field, which validates it, and its location."""

    field: Any
    loc: tuple[str, ...]

    def read(self, given: Any, values: Values, errors: Errors) -> None:
        field = self.field
        if given is ABSENT:
            if field.field_info.is_required():
                errors.append({"type": "missing", "loc": self.loc, "msg": "Field required", "input": None})
            else:
                values[field.name] = field.default
            return
        value, invalid = field.validate(given, {}, loc=self.loc)
        if invalid:
            errors.extend(invalid)
        else:
            values[field.name] = value


class _Unshareable(Exception):
    """The values of a query string cannot be cached."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values


class QueryModel:
    """A model of query parameters. Frozen models are cached by query string.

    A model is not cached if a member can be modified, as a list can, or has a default from a function.
    """

    def __init__(self, field: Field, model: type[BaseModel]) -> None:
        self._field = field
        self._names = frozenset(model.model_fields)
        self._lists = {name for name, member in model.model_fields.items() if _is_list(member.annotation)}
        is_fixed = all(member.default_factory in _EMPTY for member in model.model_fields.values())
        is_shareable = is_fixed and model.model_config.get("frozen")
        self._cached = lru_cache(MAX_QUERIES)(self._validate_shareable) if is_shareable else self._validate

    def read(self, given: bytes, values: Values, errors: Errors) -> None:
        try:
            parsed, invalid = (self._cached if len(given) <= MAX_QUERY else self._validate)(given)
        except _Unshareable as error:  # exceptions are not cached
            parsed, invalid = error.values, []
        values.update(parsed)
        errors.extend(invalid)

    def _validate(self, given: bytes) -> tuple[Values, Errors]:
        values: Values = {}
        errors: Errors = []
        self._field.read(self._parse(given), values, errors)
        return values, errors

    def _validate_shareable(self, given: bytes) -> tuple[Values, Errors]:
        """Raises _Unshareable for a model that requests cannot share: one that can be modified has no hash."""
        values, errors = self._validate(given)
        try:
            hash(tuple(values.values()))
        except TypeError:
            raise _Unshareable(values) from None
        return values, errors

    def _parse(self, given: bytes) -> Values:
        """Parse a query string. A repeated parameter has its last value; lists and unknown names have all values.

        One pass: the cost is linear in the length of the query string.
        """
        found: dict[str, list[str]] = {}
        for name, value in QueryParams(given).multi_items():
            found.setdefault(name, []).append(value)
        return {
            name: values if name in self._lists or (len(values) > 1 and name not in self._names) else values[-1]
            for name, values in found.items()
        }


def query_model(field: Any) -> QueryModel:
    model = field.field_info.annotation
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Unsupported(f"the query parameter {field.name} is not part of a model")
    if any(member.alias or member.validation_alias for member in model.model_fields.values()):
        raise Unsupported(f"{model.__name__} has members with an alias")
    return QueryModel(Field(field, ("query",)), model)


def is_scalar(field: Any) -> bool:
    """Whether a path parameter or header has one name, one value, and a default that requests can share as it is."""
    info = field.field_info
    if info.validate_default:
        return False
    shareable = info.is_required() or (info.default_factory is None and isinstance(info.default, _SHAREABLE))
    has_one_name = info.validation_alias in (None, field.alias)
    return shareable and has_one_name and not _is_list(info.annotation) and not _is_model(info.annotation)


def _is_list(annotation: Any) -> bool:
    """Whether a value may be a collection."""
    kinds = (kind for each in (annotation, *get_args(annotation)) for kind in (each, get_origin(each)))
    return any(
        isinstance(kind, type) and issubclass(kind, Collection) and not issubclass(kind, _TEXT) for kind in kinds
    )


def _is_model(annotation: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in (annotation, *get_args(annotation)))
