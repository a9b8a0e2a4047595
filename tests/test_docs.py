"""The documentation is complete: every error code, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

from backend import problems
from backend.auth import bearer
from backend.problems import DomainError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def kinds(of: type[DomainError]) -> set[type[DomainError]]:
    return {of}.union(*(kinds(kind) for kind in of.__subclasses__()))


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = {
        (code, int(status))
        for code, status in re.findall(r"^\| `(\w+)` \| (\d+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    }
    answered = {(kind.code, kind.status) for kind in kinds(DomainError)}
    answered |= {(code, status) for status, code in problems.SQLSTATES.values()}
    answered |= {(code, status) for _, (status, code) in problems.WITHOUT_SQLSTATE}
    answered |= {(code, status) for status, code in problems.CODES.items()}
    answered |= {("invalid", 422), ("invalid_json", 422)}
    source = Path(bearer.__file__).read_text()
    answered |= {(code, int(status)) for status, code in re.findall(r'\b([45]\d\d), "(\w+)"', source)}
    assert documented == answered
    assert ("invalid_token", 401) in answered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target
