"""Which pinned packages are known to be vulnerable, as the registries say; a registry that says nothing is named.

Exit code 1: some are. 2: some could not be asked about, which is no all-clear.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ("dev", "postgres", "node", "containers")  # dev holds what runtime does


class Verdict(NamedTuple):
    """What is known of some pinned packages."""

    what: str
    vulnerable: Sequence[str] = ()
    """One line a package."""
    unknown: str = ""
    """Why nothing, or not everything, is known."""

    @property
    def code(self) -> int:
        return 1 if self.vulnerable else 2 if self.unknown else 0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        verdicts = [audit_python(pip_audit(Path(folder)))]
    locks = sorted(
        [*ROOT.glob("frontend-contract/**/package-lock.json"), *ROOT.glob("benchmarks/**/package-lock.json")]
    )
    verdicts += [audit_node(lock.parent) for lock in locks if "node_modules" not in lock.parts]
    for verdict in verdicts:
        say(verdict)
    codes = {verdict.code for verdict in verdicts}
    return 1 if 1 in codes else max(codes)


def pip_audit(folder: Path) -> list[str]:
    """How to start it: it is needed here alone, so it is installed in `folder`."""
    install = ["-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-user", "--target", str(folder)]
    subprocess.run([sys.executable, "-I", *install, "pip-audit"], check=False)  # noqa: S603 - our own Python
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(folder)!r}); from pip_audit._cli import audit; audit()",
    ]


def audit_python(program: Sequence[str]) -> Verdict:
    """Ask the package index about every requirement, with pip-audit as `program`."""
    what = "requirements/*.txt"
    options = ["--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    files = [word for name in REQUIREMENTS for word in ("--requirement", f"requirements/{name}.txt")]
    report, said = ask([*program, *options, *files])
    if "dependencies" not in report:
        return Verdict(what, unknown=said)
    vulnerable, skipped = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(package["name"])
        for found in package.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            vulnerable.append(f"{package['name']} {package['version']}: {found['id']}, mended in {fixed}")
    if skipped:
        reason = f"the index tells nothing of {len(skipped)} of {len(report['dependencies'])} packages"
        return Verdict(
            what, vulnerable, f"{reason} ({', '.join(skipped[:3])} ...): is it a mirror without that service?"
        )
    if not report["dependencies"]:
        return Verdict(what, unknown="no packages were found")
    return Verdict(what, vulnerable)


def audit_node(folder: Path, npm: Sequence[str] = ("npm",)) -> Verdict:
    """Ask the npm registry about every package of a lock."""
    what = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    report, said = ask([*npm, "audit", "--json"], folder)
    if not isinstance(found := report.get("vulnerabilities"), dict):
        return Verdict(what, unknown=report.get("message") or said)
    return Verdict(what, [f"{name} {entry['range']}: {entry['severity']}" for name, entry in found.items()])


def ask(command: Sequence[str], folder: Path = ROOT) -> tuple[Mapping[str, Any], str]:
    """The JSON object that a program prints, empty when it does not, and the last line that it said beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        done = subprocess.run(  # noqa: S603 - programs named above
            command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        return {}, f"{command[0]}: {error.strerror}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = None
    return report if isinstance(report, dict) else {}, lines[-1] if lines else f"exit code {done.returncode}"


def say(verdict: Verdict) -> None:
    for line in verdict.vulnerable:
        sys.stdout.write(f"VULNERABLE   {verdict.what}: {line}\n")
    if verdict.unknown:
        sys.stdout.write(f"NOT AUDITED  {verdict.what}: {verdict.unknown}\n")
    elif not verdict.vulnerable:
        sys.stdout.write(f"ok           {verdict.what}: nothing is known against it\n")


if __name__ == "__main__":
    sys.exit(main())
