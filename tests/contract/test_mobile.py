"""The mobile recipe: its own tests, and its session and replica against a real issuer and a real API."""

from collections.abc import Mapping

import pytest

from backend.dev.issuer import find_node
from tests.contract.packages import CONTRACT, TYPESCRIPT_TESTS, passed, run

MOBILE = CONTRACT / "mobile"
# A failure at each request of a sync. The recipe's own tests also try it, against a fake API.
EACH_FAILURE = "a sync completes after a failure of any request"


def test_the_tests_of_the_recipe_pass() -> None:
    assert passed(run(find_node(), MOBILE, *TYPESCRIPT_TESTS, *sorted((MOBILE / "tests").glob("*.test.ts")))) >= 17


@pytest.mark.parametrize(
    ("selection", "least"),
    [
        pytest.param(f"--test-skip-pattern={EACH_FAILURE}", 5, id="gate"),
        pytest.param(f"--test-name-pattern={EACH_FAILURE}", 1, id="each failure", marks=pytest.mark.full),
    ],
)
def test_the_recipe_works_with_the_real_servers(servers: Mapping[str, str], selection: str, least: int) -> None:
    assert passed(run(find_node(), MOBILE, *TYPESCRIPT_TESTS, selection, "tests/real.ts", **servers)) >= least
