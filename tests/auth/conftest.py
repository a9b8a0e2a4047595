"""What the tests of `backend.auth` share; they need nothing of the application."""

import pytest

from backend.auth.testing import ALGORITHMS, LocalIssuer
from tests.auth.scripted import Endpoint, Time


@pytest.fixture(scope="session")
def issuers() -> dict[str, LocalIssuer]:
    """An issuer for each algorithm, made once: an RSA key takes a while."""
    return {alg: LocalIssuer(alg=alg) for alg in ALGORITHMS}


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def issuer(time: Time) -> LocalIssuer:
    return LocalIssuer(clock=time.clock)


@pytest.fixture
def endpoint(issuer: LocalIssuer) -> Endpoint:
    return Endpoint(issuer)
