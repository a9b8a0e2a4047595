"""The audit fails on what is known, and takes no silent registry for an all-clear; what registries say is scripted."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ops import audit
from ops.audit import Verdict

GOOD = {"name": "anyio", "version": "4.16.0", "vulns": []}
BAD = {
    "name": "jinja2",
    "version": "2.4",
    "vulns": [{"id": "PYSEC-2014-8", "fix_versions": ["2.7.2"], "aliases": ["CVE-2014-1402"], "description": "..."}],
}
UNKNOWN = {"name": "mako", "skip_reason": "Dependency not found on PyPI and could not be audited: mako (1.4.3)"}


def saying(report: object, error: str = "", code: int = 0) -> list[str]:
    """A program that prints this, whatever it is asked."""
    text = report if isinstance(report, str) else json.dumps(report)
    return [sys.executable, "-c", f"import sys; print({text!r}); print({error!r}, file=sys.stderr); sys.exit({code})"]


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([GOOD], 0, "ok           requirements/*.txt: nothing is known against it"),
        ([GOOD, BAD], 1, "VULNERABLE   requirements/*.txt: jinja2 2.4: PYSEC-2014-8, mended in 2.7.2"),
        ([GOOD, UNKNOWN], 2, "NOT AUDITED  requirements/*.txt: the index tells nothing of 1 of 2 packages (mako ...)"),
        ([BAD, UNKNOWN], 1, "VULNERABLE   requirements/*.txt: jinja2"),
        ([], 2, "NOT AUDITED  requirements/*.txt: no packages were found"),
    ],
)
def test_what_the_package_index_says(
    capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]], code: int, words: str
) -> None:
    verdict = audit.audit_python(saying({"dependencies": packages, "fixes": []}, code=code))
    audit.say(verdict)
    assert verdict.code == code
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("report", "code", "words"),
    [
        ({"vulnerabilities": {}}, 0, "ok  "),
        (
            {"vulnerabilities": {"minimist": {"name": "minimist", "severity": "critical", "range": "<0.2.4"}}},
            1,
            "VULNERABLE   lock: minimist <0.2.4: critical",
        ),
        ({"message": "405 Method Not Allowed", "statusCode": 405, "body": ""}, 2, "NOT AUDITED  lock: 405 Method Not"),
        ({"error": {"code": "ENOLOCK"}}, 2, "NOT AUDITED  lock: npm says why"),
        ("no JSON", 2, "NOT AUDITED  lock: npm says why"),
    ],
)
def test_what_the_npm_registry_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, report: object, code: int, words: str
) -> None:
    folder = tmp_path / "lock"
    folder.mkdir()
    verdict = audit.audit_node(folder, saying(report, "npm says why", code))
    audit.say(verdict)
    assert verdict.code == code
    assert words in capsys.readouterr().out


def test_a_program_that_is_not_there_is_no_all_clear(tmp_path: Path) -> None:
    for verdict in audit.audit_node(tmp_path, ["no-npm-here"]), audit.audit_python(["no-pip-audit-here"]):
        assert verdict.code == 2
        assert "No such file" in verdict.unknown


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([Verdict("a"), Verdict("b")], 0),
        ([Verdict("a", unknown="?"), Verdict("b", ["bad"])], 1),
        ([Verdict("a"), Verdict("b", unknown="?")], 2),
    ],
)
def test_what_is_known_outweighs_what_is_not(
    monkeypatch: pytest.MonkeyPatch, verdicts: list[Verdict], code: int
) -> None:
    monkeypatch.setattr(audit, "pip_audit", lambda _: [])
    monkeypatch.setattr(audit, "audit_python", lambda _: verdicts[0])
    monkeypatch.setattr(audit, "audit_node", lambda _: verdicts[1])
    assert audit.main() == code


def test_every_lock_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def note(folder: Path) -> Verdict:
        folders.append(folder)
        return Verdict("node")

    monkeypatch.setattr(audit, "pip_audit", lambda _: [])
    monkeypatch.setattr(audit, "audit_python", lambda _: Verdict("python"))
    monkeypatch.setattr(audit, "audit_node", note)
    audit.main()
    assert {folder.name for folder in folders} >= {"frontend-contract", "better-auth-oauth", "load"}
    names = {path.stem for path in (audit.ROOT / "requirements").glob("*.txt")}
    assert names == {*audit.REQUIREMENTS, "runtime"}
    pinned = {
        name: set(re.findall(r"^\S+==\S+", (audit.ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE))
        for name in ("runtime", "dev")
    }
    assert pinned["runtime"] <= pinned["dev"]
