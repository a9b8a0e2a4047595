"""The TypeScript packages compile in strict mode, and the tests of the Better Auth plugin pass."""

import pytest

from backend.dev.issuer import find_node
from tests.contract.packages import CONTRACT, TSC, TYPESCRIPT_TESTS, passed, run

BETTER_AUTH = CONTRACT / "better-auth"

# Left to the full run. A crash at another moment, and an outbox full of the most frequent event, stay in the gate.
REPETITIONS = (
    "a server is killed (before|after) the change|"
    "after a kill in (account|session|.*UPDATE OF toe)|"
    "1,500 events of type account"
)


# `client` and `client/tests` are compiled by the fixtures of test_client.py.
@pytest.mark.parametrize("folder", ["better-auth", "better-auth-oauth", "mobile", "web", "web/tests"])
def test_the_types_are_correct(folder: str) -> None:
    run(find_node(), CONTRACT / folder, TSC, "--noEmit", "-p", ".")


@pytest.mark.parametrize(
    ("selection", "least"),
    [
        pytest.param(f"--test-skip-pattern=/{REPETITIONS}/", 80, id="gate"),
        pytest.param(f"--test-name-pattern=/{REPETITIONS}/", 8, id="repetitions", marks=pytest.mark.full),
    ],
)
def test_the_tests_of_the_better_auth_plugin_pass(selection: str, least: int) -> None:
    assert passed(run(find_node(), BETTER_AUTH, *TYPESCRIPT_TESTS, selection)) >= least
