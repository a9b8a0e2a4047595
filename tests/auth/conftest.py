"""Fixtures of the tests of `backend.auth`, which do not use the application."""

import pytest

from backend.auth import jwks_client
from backend.auth.testing import ALGORITHMS, LocalIssuer
from tests.auth.scripted import Endpoint, Jwks, Time


@pytest.fixture(scope="session")
def issuers() -> dict[str, LocalIssuer]:
    """An issuer for each algorithm, created once because RSA keys are slow to generate."""
    return {alg: LocalIssuer(alg=alg) for alg in ALGORITHMS}


@pytest.fixture(scope="session")
def jwks(issuers: dict[str, LocalIssuer]) -> Jwks:
    """A public JWK with kid `k` for each algorithm."""
    return {alg: {**issuers[alg].key.jwk, "kid": "k"} for alg in ALGORITHMS}


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def issuer(time: Time) -> LocalIssuer:
    return LocalIssuer(clock=time.clock)


@pytest.fixture
def endpoint(issuer: LocalIssuer) -> Endpoint:
    return Endpoint(issuer)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait for a fetch only 10 ms instead of two seconds."""
    monkeypatch.setattr(jwks_client, "WAIT_TIMEOUT", 0.01)
