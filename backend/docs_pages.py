"""Generated pages of the documentation: settings and routes, as Markdown."""

from typing import Any

from backend.settings import Settings


def settings_page() -> str:
    """Every setting as a page of Markdown."""
    lines = [
        "# Settings",
        "",
        "Settings are read from the environment and from `.env`. An empty value counts as unset. An invalid value",
        "stops the start with one line. `resource-server doctor` finds values that are valid but do not fit. This page",
        "is the output of `resource-server settings`.",
        "",
    ]
    for name, schema in Settings.model_json_schema()["properties"].items():
        lines += [f"## {name.upper()}", "", schema["description"], ""]
        values = [f"`{value}`" for part in (schema, *schema.get("anyOf", ())) for value in part.get("enum", ())]
        facts = [" or ".join(values)] if values else []
        match schema:
            case {"type": kind, "minimum": least, "maximum": most}:
                facts = [f"a {'whole ' if kind == 'integer' else ''}number from {least:g} to {most:g}"]
            case {"type": "array"}:
                facts = ["a list"]
            case {"format": "password"}:
                facts = ["a secret"]
        if schema.get("default") and schema.get("type") != "array" and "Default: " not in schema["description"]:
            facts.append(f"default `{schema['default']}`")
        lines += [f"Value: {'; '.join(facts)}.", ""] if facts else []
    return "\n".join(lines[:-1]) + "\n"


def routes_page(document: dict[str, Any]) -> str:
    """Every operation of an OpenAPI document, grouped by tag."""
    rows: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            access = "" if operation.get("security") else "public"
            description = operation.get("description") or operation.get("summary", "")
            text = " ".join(description.split("\n\n")[0].split()).replace("|", "\\|")
            for tag in operation.get("tags") or ("other",):
                rows.setdefault(tag, []).append(f"| `{method.upper()} {path}` | {text} | {access} |")
    lines = [
        "# Routes",
        "",
        "Parameters, bodies and responses are in the [OpenAPI document](../frontend-contract/openapi.json), and at",
        "`/docs` of a running server. This page is the output of `resource-server routes`.",
        "",
    ]
    for tag in sorted(rows):
        lines += [f"## {tag}", "", "| Operation | Description | Access |", "|---|---|---|", *rows[tag], ""]
    return "\n".join(lines[:-1]) + "\n"
