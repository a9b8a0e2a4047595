"""Compares two OpenAPI documents and lists the changes that break clients of the old one.

A request may accept more, and a response may contain more. The reverse breaks clients.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

# Raising a lower bound, or lowering an upper bound, excludes values.
LOWER_BOUNDS = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
UPPER_BOUNDS = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
METHODS = ("get", "put", "post", "patch", "delete", "head", "options", "trace")


def may_break(old: str, new: str) -> bool:
    """Whether semantic versioning allows breaking changes between two versions (semver.org, 4 and 8)."""
    (old_major, old_minor), (new_major, new_minor) = (map(int, version.split(".")[:2]) for version in (old, new))
    return new_major > old_major or (new_major == old_major == 0 and new_minor > old_minor)


def breaks(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The changes that break a client of the old document, one line each."""
    return list(dict.fromkeys(_Comparison(old, new).operations()))


class _Comparison:
    def __init__(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        self._old = old
        self._new = new

    def operations(self) -> Iterator[str]:
        for path, methods in self._old["paths"].items():
            for method in set(METHODS) & set(methods):
                where = f"{method.upper()} {path}"
                now = self._new["paths"].get(path, {}).get(method)
                if now is None:
                    yield f"{where}: was removed"
                else:
                    yield from self._operation(where, methods[method], now)

    def _operation(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        yield from self._parameters(where, old, new)
        yield from self._body(where, old.get("requestBody"), new.get("requestBody"))
        yield from self._responses(where, old["responses"], new["responses"])
        for requirement in self._security(self._new, new):
            if requirement not in self._security(self._old, old):
                yield f"{where}: requires other credentials"

    def _security(self, document: Mapping[str, Any], operation: Schema) -> Sequence[Any]:
        requirements: Sequence[Any] = operation.get("security", document.get("security", []))
        return requirements or [{}]

    def _parameters(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        before, after = ({(p["in"], p["name"]): p for p in each.get("parameters", [])} for each in (old, new))
        for key, parameter in before.items():
            if key not in after:
                yield f"{where}: {key[0]} {key[1]} is no longer accepted"
            else:
                yield from self._sent(f"{where}: {key[0]} {key[1]}", parameter["schema"], after[key]["schema"])
        for key, parameter in after.items():
            if parameter.get("required") and not before.get(key, {}).get("required"):
                yield f"{where}: {key[0]} {key[1]} is now required"

    def _body(self, where: str, old: Schema | None, new: Schema | None) -> Iterator[str]:
        if new and new.get("required") and not (old and old.get("required")):
            yield f"{where}: a body is now required"
        for media_type, content in (old or {}).get("content", {}).items():
            if not new or media_type not in new["content"]:
                yield f"{where}: a body of {media_type} is no longer accepted"
            else:
                yield from self._sent(f"{where}: body", content["schema"], new["content"][media_type]["schema"])

    def _responses(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        for status in old.keys() | new.keys():
            before, after = old.get(status), new.get(status)
            if before and after:
                yield from self._response(f"{where}: {status}", before, after)
            elif status < "4":  # a client must expect any error
                yield f"{where}: {status} {'is new' if after else 'was removed'}"

    def _response(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        for name in old.get("headers", {}).keys() - new.get("headers", {}).keys():
            yield f"{where}: header {name} was removed"
        for media_type, content in old.get("content", {}).items():
            if media_type not in new.get("content", {}):
                yield f"{where}: {media_type} was removed"
            elif "schema" in content:
                yield from self._received(where, content["schema"], new["content"][media_type].get("schema", {}))

    def _sent(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        yield from _Subset(self._old, self._new, request=True).gaps(where, old, new, frozenset())

    def _received(self, where: str, old: Schema, new: Schema) -> Iterator[str]:
        yield from _Subset(self._new, self._old, request=False).gaps(where, new, old, frozenset())


class _Subset:
    """Finds values of the narrow schema that the wide one excludes.

    Old requests must fit the new schema, and new responses the old one.
    """

    def __init__(self, narrow: Mapping[str, Any], wide: Mapping[str, Any], *, request: bool) -> None:
        self._narrow = narrow
        self._wide = wide
        self._request = request

    def gaps(self, where: str, narrow: Schema, wide: Schema, above: frozenset[tuple[str, str]]) -> Iterator[str]:
        choices, others = list(_choices(self._narrow, narrow)), list(_choices(self._wide, wide))
        for name, choice in choices:
            named = name[0].isupper()
            # A named schema is reported once for all its uses.
            place = f"{name} ({'request' if self._request else 'response'})" if named else where
            found = [
                # A schema that contains itself is already being compared.
                []
                if named and (name, kind) in above
                else list(self._compare(place, choice, other, above | {(name, kind)}))
                for kind, other in others
            ]
            if all(found):
                alone = len(choices) == len(others) == 1
                like = [gaps for (kind, _), gaps in zip(others, found, strict=True) if alone or kind == name]
                yield from like[0] if like else [f"{where}: {self._verb} {name}"]

    @property
    def _verb(self) -> str:
        return "no longer accepts" if self._request else "may now be"

    def _compare(self, where: str, narrow: Schema, wide: Schema, above: frozenset[tuple[str, str]]) -> Iterator[str]:
        if _kind(wide) not in ("anything", _kind(narrow)) and (_kind(narrow), _kind(wide)) != ("integer", "number"):
            yield f"{where}: {self._verb} {_kind(narrow)}"
            return
        yield from self._values(where, narrow, wide)
        if "items" in wide:
            yield from self.gaps(f"{where}[]", narrow.get("items", {}), wide["items"], above)
        if _kind(wide) == "object":
            yield from self._members(where, narrow, wide, above)

    def _values(self, where: str, narrow: Schema, wide: Schema) -> Iterator[str]:
        allowed, given = _enumerated(wide), _enumerated(narrow)
        if allowed is not None:
            more = ["anything"] if given is None else [value for value in given if value not in allowed]
            yield from (f"{where}: {self._verb} {value}" for value in more)
        for bounds, tighter in (LOWER_BOUNDS, float.__gt__), (UPPER_BOUNDS, float.__lt__):
            for name in bounds:
                if name in wide and (name not in narrow or tighter(float(wide[name]), float(narrow[name]))):
                    yield f"{where}: {name} {'is now' if self._request else 'is no longer'} {wide[name]}"
        for name in "pattern", "format":
            if name in wide and wide[name] != narrow.get(name):
                yield f"{where}: {name} {'is now' if self._request else 'is no longer'} {wide[name]}"

    def _members(self, where: str, narrow: Schema, wide: Schema, above: frozenset[tuple[str, str]]) -> Iterator[str]:
        ours, theirs = narrow.get("properties", {}), wide.get("properties", {})
        for name in wide.get("required", []):
            if name not in narrow.get("required", []) and (self._request or name in ours):
                yield f"{where}: {name} {'is now required' if self._request else 'may be missing'}"
        for name in theirs.keys() - ours.keys() if not self._request else ():
            yield f"{where}: {name} was removed"
        for name, schema in ours.items():
            if name in theirs:
                yield from self.gaps(f"{where}.{name}", schema, theirs[name], above)
            elif self._request and wide.get("additionalProperties") is False:
                yield f"{where}: {name} is no longer accepted"
        closed = wide.get("additionalProperties") is False and narrow.get("additionalProperties") is not False
        if self._request and closed:
            yield f"{where}: unknown members are no longer accepted"


def _choices(document: Mapping[str, Any], schema: Schema, name: str = "") -> Iterator[tuple[str, Schema]]:
    """The alternatives of a schema with references resolved, each with its name, or that of its type."""
    if "$ref" in schema:
        named = schema["$ref"].rsplit("/", 1)[1]
        yield from _choices(document, document["components"]["schemas"][named], named)
    elif alternatives := schema.get("anyOf", schema.get("oneOf")):
        for alternative in alternatives:
            yield from _choices(document, alternative)
    elif isinstance(schema.get("type"), list):
        for kind in schema["type"]:
            yield kind, {**schema, "type": kind}
    else:
        yield name or _kind(schema), schema


def _kind(schema: Schema) -> str:
    values = _enumerated(schema)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return str(schema.get("type") or (kinds[type(values[0])] if values else "anything"))


def _enumerated(schema: Schema) -> Sequence[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")
