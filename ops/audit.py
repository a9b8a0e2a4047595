"""Checks the pinned packages for vulnerabilities known to their registries.

Exit code 0: none are known. 1: some are. 2: some packages could not be checked.
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
REQUIREMENTS = ("dev", "postgres", "node", "containers")  # dev includes runtime


class Result(NamedTuple):
    """The result for one set of pinned packages."""

    what: str
    vulnerable: Sequence[str] = ()
    """One line for each vulnerability."""
    unknown: str = ""
    """Why some or all packages could not be checked."""

    @property
    def code(self) -> int:
        return 1 if self.vulnerable else 2 if self.unknown else 0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = [audit_python(pip_audit(Path(folder)))]
    locks = sorted(
        [*ROOT.glob("frontend-contract/**/package-lock.json"), *ROOT.glob("benchmarks/**/package-lock.json")]
    )
    results += [audit_node(lock.parent) for lock in locks if "node_modules" not in lock.parts]
    for result in results:
        say(result)
    codes = {result.code for result in results}
    return 1 if 1 in codes else max(codes)


def pip_audit(folder: Path) -> list[str]:
    """Install pip-audit in `folder`, since nothing else needs it, and return its command line."""
    install = ["-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-user", "--target", str(folder)]
    subprocess.run([sys.executable, "-I", *install, "pip-audit"], check=False)  # noqa: S603 - this Python
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(folder)!r}); from pip_audit._cli import audit; audit()",
    ]


def audit_python(program: Sequence[str]) -> Result:
    """Check every Python requirement; `program` is the command line of pip-audit."""
    what = "requirements/*.txt"
    options = ["--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off"]
    files = [word for name in REQUIREMENTS for word in ("--requirement", f"requirements/{name}.txt")]
    report, message = query([*program, *options, *files])
    if "dependencies" not in report:
        return Result(what, unknown=message)
    vulnerable, skipped = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(package["name"])
        for found in package.get("vulns", ()):
            fixed = ", ".join(found["fix_versions"]) or "no version"
            vulnerable.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    if skipped:
        reason = f"the index has no data on {len(skipped)} of {len(report['dependencies'])} packages"
        return Result(
            what, vulnerable, f"{reason} ({', '.join(skipped[:3])} ...): is it a mirror without that service?"
        )
    if not report["dependencies"]:
        return Result(what, unknown="no packages were found")
    return Result(what, vulnerable)


def audit_node(folder: Path, npm: Sequence[str] = ("npm",)) -> Result:
    """Check every package of a lock file with `npm audit`."""
    what = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    report, message = query([*npm, "audit", "--json"], folder)
    if not isinstance(found := report.get("vulnerabilities"), dict):
        return Result(what, unknown=report.get("message") or message)
    return Result(what, [f"{name} {entry['range']}: {entry['severity']}" for name, entry in found.items()])


def query(command: Sequence[str], folder: Path = ROOT) -> tuple[Mapping[str, Any], str]:
    """Run a program; return the JSON object on its stdout, empty if there is none, and the last line on its stderr."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        done = subprocess.run(  # noqa: S603 - programs named in this file
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


def say(result: Result) -> None:
    for line in result.vulnerable:
        sys.stdout.write(f"VULNERABLE   {result.what}: {line}\n")
    if result.unknown:
        sys.stdout.write(f"NOT AUDITED  {result.what}: {result.unknown}\n")
    elif not result.vulnerable:
        sys.stdout.write(f"ok           {result.what}: no known vulnerabilities\n")


if __name__ == "__main__":
    sys.exit(main())
