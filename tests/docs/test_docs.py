"""The documentation: error codes and threats are complete; links, paths, tests, commands and settings exist."""

import re
from pathlib import Path

import pytest

import bootstrap
from backend.app import create_app
from backend.auth import bearer
from backend.cli import _parser
from backend.docs_pages import routes_page
from backend.settings import Settings
from backend.web import problems
from backend.web.problems import DomainError

ROOT = Path(__file__).parents[2]
FOR_AGENTS = [ROOT / "AGENTS.md", ROOT / "llms.txt"]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *FOR_AGENTS,
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "backend").glob("*/README.md")),
    ROOT / "frontend-contract/README.md",
    *sorted((ROOT / "frontend-contract").glob("*/README.md")),
]


def subclasses(of: type[DomainError]) -> set[type[DomainError]]:
    return {of}.union(*(subclasses(error) for error in of.__subclasses__()))


def test_every_error_code_is_documented_with_its_status() -> None:
    create_app()  # imports every feature, and so all error classes
    documented = {
        (code, int(status))
        for code, status in re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    }
    answered = {(error.code, error.status) for error in subclasses(DomainError)}
    answered |= {(code, status) for status, code in problems.SQLSTATES.values()}
    answered |= {(code, status) for _, (status, code) in problems.WITHOUT_SQLSTATE}
    answered |= {(code, status) for status, code in problems.CODES.items()}
    answered |= {("invalid", 422), ("invalid_json", 422)}
    source = Path(bearer.__file__).read_text()
    answered |= {(code, int(status)) for status, code in re.findall(r'\b([45]\d\d), "(\w+)"', source)}
    assert documented == answered
    assert ("invalid_token", 401) in answered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_targets_of_links_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", FOR_AGENTS, ids=lambda page: page.name)
def test_named_paths_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    top = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir())
    for path in re.findall(rf"(?<![\w/.-])(?:{top})/(?:[\w./*-]*[\w*/])?", prose):
        assert any(ROOT.glob(path)), path


def test_the_list_for_language_models_has_the_format_of_llmstxt_org() -> None:
    """A title, a summary, text without headings, then sections that contain only links with descriptions."""
    summary, *sections = re.split(r"^## ", (ROOT / "llms.txt").read_text(), flags=re.MULTILINE)
    assert re.match(r"# .+\n\n(> .+\n)+\n", summary)
    assert len(re.findall(r"^#", summary, re.MULTILINE)) == 1
    assert [section.partition("\n")[0] for section in sections] == ["Integrating", "Forking", "Operating", "Optional"]
    for section in sections:
        assert re.fullmatch(r".+\n\n(- \[[^]\n]+\]\([^)\s]+\): .+\n)+\n?", section), section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
        assert re.search(rf"^ *(async )?def {name}\(" if name else "", (ROOT / file).read_text(), re.MULTILINE), name


def test_every_threat_names_its_test() -> None:
    threats, found = (ROOT / "docs/threat-model.md").read_text().partition("## Spoofing")[2], 0
    for row in re.findall(r"^\| (?!Threat|-)(.+) \|$", threats, re.MULTILINE):
        found += 1
        assert re.fullmatch(r"`tests/.+::\w+`", row.split(" | ")[-1]), row
    assert found > 30


def test_the_page_of_routes_is_up_to_date() -> None:
    page = (ROOT / "docs/routes.md").read_text()
    assert page == routes_page(create_app().openapi()), "run `.venv/bin/resource-server routes > docs/routes.md`"


@pytest.mark.parametrize(("page", "words"), [("README.md", 900), ("AGENTS.md", 450)])
def test_a_page_is_short(page: str, words: int) -> None:
    assert len((ROOT / page).read_text().split()) < words


def test_named_commands_and_settings_exist() -> None:
    commands = {name for action in _parser()._actions for name in action.choices or ()}
    targets = set(re.findall(r"^ {2}([\w-]+) ", bootstrap.USAGE, re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"(?<![\w.])resource-server (\w+)", text)) <= commands, page.name
        assert set(re.findall(r"`make ([\w-]+)", text)) <= targets, page.name
    settings = {name.upper() for name in Settings.model_fields}
    guide = (ROOT / "docs/run-in-production.md").read_text()
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)\b", guide)) - {"BETTER_AUTH_SECRET"}
    assert named
    assert named <= settings
