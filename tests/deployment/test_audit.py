"""The exit codes and reports of the package audit, with scripts in place of the registries."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from ops import audit
from ops.audit import Result

GOOD = {"name": "anyio", "version": "4.16.0", "vulns": []}
BAD = {
    "name": "jinja2",
    "version": "2.4",
    "vulns": [{"id": "PYSEC-2014-8", "fix_versions": ["2.7.2"], "aliases": ["CVE-2014-1402"], "description": "..."}],
}
UNKNOWN = {"name": "mako", "skip_reason": "Dependency not found on PyPI and could not be audited: mako (1.4.3)"}


def program_printing(report: object, error: str = "", code: int = 0) -> list[str]:
    """The command line of a program that prints this report and error, and exits with this code."""
    text = report if isinstance(report, str) else json.dumps(report)
    return [sys.executable, "-c", f"import sys; print({text!r}); print({error!r}, file=sys.stderr); sys.exit({code})"]


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([GOOD], 0, "ok           requirements/*.txt: no known vulnerabilities"),
        ([GOOD, BAD], 1, "VULNERABLE   requirements/*.txt: jinja2 2.4: PYSEC-2014-8, fixed in 2.7.2"),
        ([GOOD, UNKNOWN], 2, "NOT AUDITED  requirements/*.txt: the index has no data on 1 of 2 packages (mako ...)"),
        ([BAD, UNKNOWN], 1, "VULNERABLE   requirements/*.txt: jinja2"),
        ([], 2, "NOT AUDITED  requirements/*.txt: no packages were found"),
    ],
)
def test_python_packages_are_reported_with_an_exit_code(
    capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]], code: int, words: str
) -> None:
    result = audit.audit_python(program_printing({"dependencies": packages, "fixes": []}, code=code))
    audit.say(result)
    assert result.code == code
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
        ({"error": {"code": "ENOLOCK"}}, 2, "NOT AUDITED  lock: npm's error"),
        ("no JSON", 2, "NOT AUDITED  lock: npm's error"),
    ],
)
def test_node_packages_are_reported_with_an_exit_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, report: object, code: int, words: str
) -> None:
    folder = tmp_path / "lock"
    folder.mkdir()
    result = audit.audit_node(folder, program_printing(report, "npm's error", code))
    audit.say(result)
    assert result.code == code
    assert words in capsys.readouterr().out


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    for result in audit.audit_node(tmp_path, ["no-npm-here"]), audit.audit_python(["no-pip-audit-here"]):
        assert result.code == 2
        assert "No such file" in result.unknown


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ([Result("a"), Result("b")], 0),
        ([Result("a", unknown="?"), Result("b", ["bad"])], 1),
        ([Result("a"), Result("b", unknown="?")], 2),
    ],
)
def test_a_vulnerability_outweighs_missing_data(
    monkeypatch: pytest.MonkeyPatch, results: list[Result], code: int
) -> None:
    monkeypatch.setattr(audit, "pip_audit", lambda _: [])
    monkeypatch.setattr(audit, "audit_python", lambda _: results[0])
    monkeypatch.setattr(audit, "audit_node", lambda _: results[1])
    assert audit.main() == code


def test_every_lock_file_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []

    def record(folder: Path) -> Result:
        folders.append(folder)
        return Result("node")

    monkeypatch.setattr(audit, "pip_audit", lambda _: [])
    monkeypatch.setattr(audit, "audit_python", lambda _: Result("python"))
    monkeypatch.setattr(audit, "audit_node", record)
    audit.main()
    assert {folder.name for folder in folders} >= {"frontend-contract", "better-auth-oauth", "load"}
    names = {path.stem for path in (audit.ROOT / "requirements").glob("*.txt")}
    assert names == {*audit.REQUIREMENTS, "runtime"}
    pinned = {
        name: set(re.findall(r"^\S+==\S+", (audit.ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE))
        for name in ("runtime", "dev")
    }
    assert pinned["runtime"] <= pinned["dev"]
