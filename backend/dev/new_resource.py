"""Writes a new resource: the code of docs/adding-a-resource.md under another name, and its migration."""

import json
import keyword
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from tokenize import NAME, generate_tokens
from typing import NamedTuple

from sqlalchemy.dialects.postgresql.base import RESERVED_WORDS

from backend.dev import DevError
from backend.dev.issuer import find_node
from backend.dev.postgres import EmbeddedPostgres
from backend.settings import Settings

GUIDE = Path("docs", "adding-a-resource.md")
_PACKAGE = Path(__file__).resolve().parents[1]
_LONGEST_NAME = 30
_BLOCK = re.compile(r"^```(python|diff) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_WORD = re.compile(r"(?<![a-zA-Z])(?P<article>[Aa][ _])?(?P<word>(?:note|Note|NOTE)[sS]?)(?![a-z])")
# Each resource would get the same table of labels.
_LEFT_OUT = re.compile(r"^## Many-to-many\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_CONTRACT = Path("frontend-contract")
_DOCUMENT, _ROUTES, _TYPES = _CONTRACT / "openapi.json", Path("docs", "routes.md"), _CONTRACT / "schema.d.ts"


class NewResourceError(DevError):
    """The resource cannot be written, as the message says in one line. No file has changed."""


def new_resource(plural: str, singular: str | None, settings: Settings) -> list[str]:
    """Write the resource `plural` into the checkout, and return the paths of the files written.

    settings: the migration is compared with their database; without one, with an embedded PostgreSQL.
    """
    root = find_checkout()
    name = Name(plural, singular or _singular(plural))
    name.check(root)
    guide = _LEFT_OUT.sub("", (root / GUIDE).read_text())
    _check_collisions(apply_guide(root, guide), name)
    files = apply_guide(root, name.rename(guide))
    with _database(root, settings) as url, _undone_on_error(root, files):
        environment = {**os.environ, "DATABASE_URL": url, "DATABASE_DIRECT_URL": url}
        for file, text in files.items():
            file.parent.mkdir(exist_ok=True)
            file.write_text(_with_spaced_prose(text, name) if file.suffix == ".py" else text)
        for command in ["format"], ["check", "--fix", "--output-format=concise"], ["format"]:
            _run(root, "ruff", *command, "--quiet", *map(str, files))
        before = _versions(root)
        _run(root, "alembic", "revision", "--autogenerate", "-m", plural, environment=environment)
        (migration,) = _versions(root) - before
        generated = list(_generate(root))
    return [str(file.relative_to(root)) for file in [*files, migration, *generated]]


def find_checkout() -> Path:
    """The checkout that contains the working directory, or from which the package was installed."""
    for root in Path.cwd(), *Path.cwd().parents, _PACKAGE.parent:
        if (root / GUIDE).is_file() and (root / "backend" / "app.py").is_file():
            return root
    raise NewResourceError(f"run this command in a checkout of the project: it copies the code of {GUIDE}")


def apply_guide(root: Path, guide: str) -> dict[Path, str]:
    """The texts of the files that the blocks of `guide` write or change, in this order."""
    files: dict[Path, str] = {}
    for kind, name, block in _BLOCK.findall(guide):
        file = root / name
        files[file] = _patched(files.get(file) or file.read_text(), block, name) if kind == "diff" else block
    return files


def _patched(text: str, block: str, name: str) -> str:
    """Apply a block of lines with " ", "-" and "+", and "@@" between separate places."""
    for hunk in re.split(r"^@@\n", block, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        if text.count(before) != 1:
            raise NewResourceError(f"{name} does not contain, once, the lines after which to add: {before.strip()}")
        text = text.replace(before, after)
    return text


class Name(NamedTuple):
    """The name of a resource, in lower case with underscores."""

    plural: str
    singular: str

    def check(self, root: Path) -> None:
        """Raises NewResourceError."""
        plural, singular = self
        for each in self:
            if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", each) or len(each) > _LONGEST_NAME:
                raise NewResourceError(
                    f"{each!r} is not a name in lower case, such as bank_accounts, of at most {_LONGEST_NAME} letters"
                )
            if keyword.iskeyword(each):
                raise NewResourceError(f"{each} is a keyword of Python: choose another name")
        if plural == singular:
            raise NewResourceError(f"{plural} is not a plural, such as projects: name its singular with --singular")
        if plural in RESERVED_WORDS or plural.startswith("pg_"):
            raise NewResourceError(f"{plural} is a reserved word of PostgreSQL: choose another name")
        for folder in "backend", "tests":
            if (root / folder / plural).exists() or (root / folder / f"{plural}.py").exists():
                raise NewResourceError(f"{folder}/{plural} exists: choose another name")
        from backend.app import tables

        if plural in tables().tables:
            raise NewResourceError(f"the table {plural} exists: choose another name")

    def rename(self, text: str) -> str:
        """Replace notes and note in identifiers and prose, in the case that each has."""

        def other(match: re.Match[str]) -> str:
            article, word = match["article"] or "", match["word"]
            name = self.plural if word.lower() == "notes" else self.singular
            if article and name[0] in "aeiou":
                article = f"{article[0]}n{article[1]}"
            return article + (name.upper() if word.isupper() else _camel_case(name) if word.istitle() else name)

        return _WORD.sub(other, text)


def _singular(plural: str) -> str:
    if plural.endswith("ies"):
        return f"{plural[:-3]}y"
    if re.search(r"(ss|sh|ch|x|z|tus)es$", plural):
        return plural[:-2]
    return plural if plural.endswith("ss") else plural.removesuffix("s")


def _camel_case(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _check_collisions(files: Mapping[Path, str], name: Name) -> None:
    """Raises NewResourceError if a new identifier is also another one of the same file."""
    for file, text in files.items():
        if "notes" not in file.parts:
            continue
        words = {token.string for token in generate_tokens(StringIO(text).readline) if token.type == NAME}
        taken = {new for word in words if (new := name.rename(word)) != word} & words
        if taken:
            raise NewResourceError(f"{min(taken)} is a name in the code of every resource: choose another name")


def _with_spaced_prose(text: str, name: Name) -> str:
    """Write names of several words with spaces in docstrings."""
    words = re.compile(rf"(?<![\w`/])(?:{name.plural}|{name.singular})(?![\w`])")

    def spaced(match: re.Match[str]) -> str:
        return words.sub(lambda word: word[0].replace("_", " "), match[0])

    return re.sub(r'""".*?"""', spaced, text, flags=re.DOTALL)


@contextmanager
def _database(root: Path, settings: Settings) -> Iterator[str]:
    """The address of a migrated database."""
    if settings.direct_url:
        yield settings.direct_url
        return
    with EmbeddedPostgres(durable=False) as postgres:
        _run(root, "backend.cli", "migrate", environment={**os.environ, "DATABASE_URL": postgres.url})
        yield postgres.url


@contextmanager
def _undone_on_error(root: Path, files: Mapping[Path, str]) -> Iterator[None]:
    """Restore all files, and remove new ones, if the block raises."""
    versions = _versions(root)
    touched = [*files, *(root / name for name in (_DOCUMENT, _ROUTES, _TYPES))]
    before = {file: file.read_bytes() if file.exists() else None for file in touched}
    try:
        yield
    except BaseException:
        for file, content in before.items():
            if content is not None:
                file.write_bytes(content)
            else:
                file.unlink(missing_ok=True)
                if file.parent.is_dir() and not any(file.parent.iterdir()):
                    file.parent.rmdir()
        for file in _versions(root) - versions:
            file.unlink()
        raise


def _generate(root: Path) -> Iterator[Path]:
    """Update the OpenAPI document, the page of routes and the types of clients, where they exist."""
    for command, name in ("openapi", _DOCUMENT), ("routes", _ROUTES):
        if (root / name).exists():
            (root / name).write_text(_run(root, "backend.cli", command))
            yield root / name
    program = root / _CONTRACT / "node_modules" / "openapi-typescript" / "bin" / "cli.js"
    if program.exists():
        options = json.loads((root / _CONTRACT / "package.json").read_text())["scripts"]["schema"].split()[1:]
        _execute(root / _CONTRACT, find_node(), str(program), *options)
        yield root / _TYPES


def _versions(root: Path) -> set[Path]:
    return set((root / "backend" / "migrations" / "versions").glob("*.py"))


def _run(root: Path, *module: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a Python module in the checkout and return its output. Raises NewResourceError."""
    return _execute(root, sys.executable, "-m", *module, environment=environment)


def _execute(folder: Path, *command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output. Raises NewResourceError with its last line."""
    done = subprocess.run(  # noqa: S603 - fixed programs
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no error output").splitlines()[-1]
        raise NewResourceError(f"{' '.join((Path(command[0]).name, *command[1:4]))} failed: {said}")
    return done.stdout
