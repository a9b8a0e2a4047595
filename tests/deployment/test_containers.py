"""The Dockerfile, `.dockerignore` and `compose.yaml`, checked without building or running a container."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from backend.cli import _parser
from backend.settings import Settings
from tests.support.programs import find

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage with their arguments, in order, including `FROM`."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            instructions = found.setdefault(arguments.rpartition(" AS ")[2], [])
        instructions.append((name, arguments.strip()))
    return found


STAGES = stages()


def arguments_of(stage: str, instruction: str) -> list[str]:
    return [arguments for name, arguments in STAGES[stage] if name == instruction]


def test_the_default_image_is_the_api() -> None:
    assert list(STAGES) == ["issuer", "build", "api"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_is_based_on_a_version(stage: str) -> None:
    (source,) = arguments_of(stage, "FROM")
    assert re.fullmatch(r"[a-z]+:\d+(\.\d+)*-[a-z-]+ AS \w+", source), source


def test_both_stages_of_the_api_are_based_on_the_same_python() -> None:
    """The virtual environment is copied between them, and its Python is a link into the base image."""
    assert len({arguments_of(stage, "FROM")[0].partition(" ")[0] for stage in ("build", "api")}) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_copied_files_exist_and_are_not_ignored(stage: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    included = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for words in map(shlex.split, arguments_of(stage, "COPY")):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in STAGES
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert source in included


def test_secrets_and_build_results_are_excluded_from_images() -> None:
    patterns = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split() if "**/" in line]
    for name in ".env", ".env.local", ".data", "node_modules", "__pycache__":
        assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize("stage", ["issuer", "api"])
def test_an_image_runs_without_root_and_without_a_shell(stage: str) -> None:
    (user,) = arguments_of(stage, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert STAGES[stage].index(("USER", user)) > max(
        (index for index, (word, _) in enumerate(STAGES[stage]) if word in ("RUN", "COPY")), default=-1
    )
    for word in "CMD", "ENTRYPOINT":
        for command in arguments_of(stage, word):
            assert yaml.safe_load(command)[0] in ("python", "node", "serve"), command
    assert arguments_of(stage, "HEALTHCHECK")[0].rpartition(" CMD ")[2].startswith("[")


def test_packages_are_installed_by_their_hashes() -> None:
    install = next(run for run in arguments_of("build", "RUN") if "pip" in run)
    for option in "--require-hashes", "--no-deps", "--only-binary=:all:", "-r runtime.txt":
        assert option in install


def test_the_command_lines_are_valid() -> None:
    entry = yaml.safe_load(arguments_of("api", "ENTRYPOINT")[0])
    assert entry == ["python", "-m", "backend.cli"]
    commands = [
        yaml.safe_load(arguments_of("api", "CMD")[0]),
        *(SERVICES[name]["command"] for name in ("api", "migrate")),
    ]
    assert [_parser().parse_args(command).run.__name__ for command in commands] == ["serve", "serve", "migrate"]


def test_the_health_check_fails_without_a_server(servers: Mapping[str, str]) -> None:
    """The command of the image is run unchanged except for its port."""
    *program, code = yaml.safe_load(arguments_of("api", "HEALTHCHECK")[0].rpartition(" CMD ")[2])
    assert program == ["python", "-c"]
    assert "8000" in code

    def check(port: int | None) -> int:
        return subprocess.call(
            [sys.executable, "-c", code.replace("8000", str(port))], stderr=subprocess.DEVNULL, env={}
        )

    assert check(urlsplit(servers["API_URL"]).port) == 0
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert check(unused.getsockname()[1]) == 1


class TestCompose:
    def test_only_the_api_and_the_issuer_are_published_on_loopback(self) -> None:
        ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
        assert ports == {"issuer": ["127.0.0.1:3000:3000", "127.0.0.1:8000:8000"]}

    def test_the_api_reaches_the_keys_over_its_own_loopback(self) -> None:
        """It shares the issuer's network namespace, so that the browsers' address of the issuer works for it, too."""
        api, issuer = SERVICES["api"], SERVICES["issuer"]
        assert api["network_mode"] == "service:issuer"
        environment = {name.lower(): value for name, value in api["environment"].items() if name != "PGPASSWORD"}
        environment["cors_origins"] = ()
        settings = Settings(_env_file=None, **environment)
        assert set(environment) <= set(Settings.model_fields)
        assert settings.better_auth_url == issuer["environment"]["ISSUER_URL"]
        assert settings.jwks_url == "http://localhost:3000/api/auth/jwks"
        assert settings.events_audience == issuer["environment"]["ISSUER_SECURITY_EVENTS_AUDIENCE"]
        known = (ROOT / "frontend-contract/better-auth/settings.ts").read_text()
        assert [name for name in issuer["environment"] if f'"{name}"' not in known] == []

    def test_secrets_come_from_the_environment(self) -> None:
        values = {
            name: value for service in SERVICES.values() for name, value in service.get("environment", {}).items()
        }
        secrets = {name: value for name, value in values.items() if "SECRET" in name or "PASSWORD" in name}
        assert set(secrets) == {"POSTGRES_PASSWORD", "ISSUER_SECRET", "PGPASSWORD"}
        assert all(re.match(r"\$\{[A-Z_]+[:}]", value) for value in secrets.values())

    @pytest.mark.parametrize("name", ["redis", "issuer", "migrate", "api"])
    def test_a_service_has_a_read_only_root_and_no_capabilities(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]

    def test_each_service_waits_for_its_dependencies(self) -> None:
        assert {name: set(service.get("depends_on", ())) for name, service in SERVICES.items()} == {
            "postgres": set(),
            "redis": set(),
            "issuer": set(),
            "migrate": {"postgres"},
            "api": {"migrate", "issuer", "redis"},
        }
        built = {name for name, service in SERVICES.items() if "build" in service}
        for name, service in SERVICES.items():
            assert "healthcheck" in service or name in built


@pytest.mark.needs("hadolint")
def test_hadolint_reports_nothing() -> None:
    done = subprocess.run([str(find("hadolint")), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.needs("docker-compose")
@pytest.mark.parametrize("missing", [None, "POSTGRES_PASSWORD", "BETTER_AUTH_SECRET"])
def test_compose_accepts_its_file_and_names_a_missing_secret(missing: str | None) -> None:
    secrets = {name: "x" for name in ("POSTGRES_PASSWORD", "BETTER_AUTH_SECRET") if name != missing}
    done = subprocess.run(
        [str(find("docker-compose")), "--env-file", os.devnull, "config", "--quiet"],
        cwd=ROOT,
        env=secrets,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is (missing is None), done.stderr
    assert missing is None or f"required variable {missing} is missing" in done.stderr
