"""The web app in a real browser with the real API; the tests are in frontend-contract/web/tests."""

import re
import shutil
import socket
from collections.abc import Iterator, Mapping

import pytest

from backend.dev.issuer import CONTRACT, Issuer, find_node
from backend.dev.web import build
from backend.settings import Settings
from tests.contract.packages import TYPESCRIPT_TESTS, passed, run
from tests.contract.serving import serving

pytestmark = pytest.mark.needs("chromium")

TESTS = CONTRACT / "web" / "tests"
ADMIN = "root@example.com"
# Accessibility takes as long as the others together.
IN_GATE = "flow.test.ts", "people.test.ts", "tabs.test.ts"


@pytest.fixture(scope="module")
def servers(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Run the web app and the API; the environment of the browser tests."""
    build(lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        api_port, web_port = one.getsockname()[1], other.getsockname()[1]
    api = f"http://127.0.0.1:{api_port}"
    issuer = Issuer(
        web=True,
        port=web_port,
        api_url=api,
        admin_emails=[ADMIN],
        security_events=f"{api}/api/v1/security-events",
    )
    environment = {
        "DATABASE_URL": settings.database_url or "",
        "BETTER_AUTH_URL": f"http://localhost:{web_port}",
        "PUBLIC_URL": api,
        "CORS_ORIGINS": f"http://localhost:{web_port}",
        "RATE_LIMIT": "off",
    }
    with issuer, serving(tmp_path_factory.mktemp("web"), environment, api_port):
        yield {
            "API_URL": api,
            "WEB_URL": issuer.url,
            "ISSUER_DATABASE": str(issuer.database),
            "ADMIN_EMAIL": ADMIN,
            "CHROMIUM": shutil.which("chromium") or "",
        }


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path.name, marks=() if path.name in IN_GATE else pytest.mark.full)
        for path in sorted(TESTS.glob("*.test.ts"))
    ],
)
def test_the_web_app_works_in_a_browser(servers: Mapping[str, str], file: str) -> None:
    written = len(re.findall(r"^test\(", (TESTS / file).read_text(), re.MULTILINE))
    assert passed(run(find_node(), TESTS, *TYPESCRIPT_TESTS, file, **servers)) == written
