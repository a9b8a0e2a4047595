"""The mobile recipe: by itself, and against the real issuer and the real API."""

from collections.abc import Mapping

from backend.dev.issuer import find_node
from tests.contract.packages import CONTRACT, run
from tests.contract.test_client import passed

MOBILE = CONTRACT / "mobile"
TEST = ("--experimental-strip-types", "--disable-warning=ExperimentalWarning", "--test", "--test-reporter=spec")


def test_its_own_tests_pass() -> None:
    assert passed(run(find_node(), MOBILE, *TEST, *sorted((MOBILE / "tests").glob("*.test.ts")))) >= 17


def test_it_speaks_to_the_real_ones(servers: Mapping[str, str]) -> None:
    assert passed(run(find_node(), MOBILE, *TEST, "tests/real.ts", **servers)) >= 5
