"""Parameters of a compiled handler, validated by FastAPI: single values, and models of the query string."""

from functools import lru_cache
from types import NoneType
from typing import Any, Final, NamedTuple, TypeVar

from fastapi._compat import field_annotation_is_scalar, field_annotation_is_sequence
from pydantic import BaseModel, Json
from starlette.datastructures import QueryParams

Errors = list[Any]
Values = dict[str, Any]
M = TypeVar("M", bound=BaseModel)

MAX_QUERIES: Final = 256  # cached for each route
MAX_QUERY: Final = 256  # bytes of a cached query string

ABSENT: Final = object()  # the request has no such parameter
_EMPTY: Final = (None, tuple, frozenset)  # default factories whose result is the same for every request
_SHAREABLE: Final = (str, int, float, bool, NoneType)


class Unsupported(TypeError):
    """The handler has parameters that only FastAPI can resolve."""


def cacheable(model: type[M]) -> type[M]:
    """Declare that a frozen model of query parameters depends on the query string alone, not on time or state.

    Its values are then cached by query string. The declaration does not hold for subclasses.
    """
    model.__cacheable__ = True  # type: ignore[attr-defined]  # read by QueryModel
    return model


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


class _Uncacheable(Exception):
    """The result of a query string must not be cached."""

    def __init__(self, values: Values, errors: Errors) -> None:
        super().__init__()
        self.result = values, errors


class QueryModel:
    """A model of query parameters. `cacheable` models are cached by query string.

    A model is not cached if a member can be modified, as a list can, or has a default from a function.
    """

    def __init__(self, field: Field, model: type[BaseModel]) -> None:
        members = model.model_fields.values()
        self._field = field
        self._names = tuple(model.model_fields)
        self._lists = {
            name for name, member in model.model_fields.items() if field_annotation_is_sequence(member.annotation)
        }
        is_fixed = all(member.default_factory in _EMPTY for member in members) and not field.field.field_info.metadata
        is_cacheable = "__cacheable__" in vars(model) and is_fixed and model.model_config.get("frozen")
        self._cached = lru_cache(MAX_QUERIES)(self._validate_cacheable) if is_cacheable else self._validate

    def read(self, given: bytes, values: Values, errors: Errors) -> None:
        try:
            parsed, invalid = (self._cached if len(given) <= MAX_QUERY else self._validate)(given)
        except _Uncacheable as error:  # exceptions are not cached
            parsed, invalid = error.result
        values.update(parsed)
        errors.extend(invalid)

    def _validate(self, given: bytes) -> tuple[Values, Errors]:
        values: Values = {}
        errors: Errors = []
        self._field.read(self._parse(given), values, errors)
        return values, errors

    def _validate_cacheable(self, given: bytes) -> tuple[Values, Errors]:
        """Raises _Uncacheable for errors, which handlers may modify, and for values that have no hash."""
        values, errors = self._validate(given)
        try:
            hash(tuple(values.values()))
        except TypeError:
            raise _Uncacheable(values, errors) from None
        if errors:
            raise _Uncacheable(values, errors)
        return values, errors

    def _parse(self, given: bytes) -> Values:
        """Parse a query string. A repeated parameter has its last value; lists and unknown names have all values.

        One pass: the cost is linear in the length of the query string. The order is FastAPI's, for validators and
        errors that show it.
        """
        found: dict[str, list[str]] = {}
        for name, value in QueryParams(given).multi_items():
            found.setdefault(name, []).append(value)
        parsed: Values = {}
        for name in self._names:
            if (values := found.pop(name, None)) is not None:
                parsed[name] = values if name in self._lists else values[-1]
        for name, values in found.items():
            parsed[name] = values if len(values) > 1 else values[0]
        return parsed


def query_model(field: Any) -> QueryModel:
    model = field.field_info.annotation
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise Unsupported(f"the query parameter {field.name} is not part of a model")
    members = model.model_fields.values()
    if any(member.alias or member.validation_alias for member in members):
        raise Unsupported(f"{model.__name__} has members with an alias")
    if any(type(each) is Json for member in (field.field_info, *members) for each in member.metadata):
        raise Unsupported(f"{model.__name__} is JSON in a query parameter")
    return QueryModel(Field(field, ("query",)), model)


def is_scalar(field: Any) -> bool:
    """Whether a path parameter or header has one name, one value, and a default that requests can share as it is."""
    info = field.field_info
    if info.validate_default:
        return False
    shareable = info.is_required() or (info.default_factory is None and isinstance(info.default, _SHAREABLE))
    has_one_name = info.validation_alias in (None, field.alias) and field.alias.isascii()
    return shareable and has_one_name and field_annotation_is_scalar(info.annotation)
