"""Requests through trusted proxies: client address, scheme and rate limits."""

from collections.abc import Sequence

import pytest
from starlette.types import Scope

from backend.auth.testing import LocalIssuer
from backend.settings import Settings
from backend.web.proxies import TrustedProxies, client_network
from tests.conftest import running

PROXIES = ("10.0.0.0/8", "192.0.2.7", "2001:db8:1::/48")


def scope(peer: str | None, headers: Sequence[tuple[str, str]] = (), scheme: str = "http") -> Scope:
    return {
        "type": "http",
        "client": (peer, 4711) if peer is not None else None,
        "scheme": scheme,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
    }


def client_and_scheme(peer: str | None, *forwarded_for: str, proto: str | None = None) -> tuple[str | None, str]:
    headers = [("x-forwarded-for", value) for value in forwarded_for]
    headers += [("x-forwarded-proto", proto)] if proto else []
    found = scope(peer, headers)
    TrustedProxies(PROXIES).apply(found)
    return found["client"] and found["client"][0], found["scheme"]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
        ("192.0.2.7", ["198.51.100.1"], "198.51.100.1"),
        ("2001:db8:1::5", ["2001:db8:ffff::1"], "2001:db8:ffff::1"),
        ("::ffff:10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
        # The proxy appends to what the client sent.
        ("10.1.2.3", ["6.6.6.6, 198.51.100.1"], "198.51.100.1"),
        ("10.1.2.3", ["6.6.6.6", "198.51.100.1"], "198.51.100.1"),
        ("10.1.2.3", ["10.9.9.9, 198.51.100.1"], "198.51.100.1"),
        # Several proxies.
        ("10.1.2.3", ["6.6.6.6, 198.51.100.1, 192.0.2.7,10.4.4.4"], "198.51.100.1"),
        # A client in the network of the proxies.
        ("10.1.2.3", ["10.5.5.5"], "10.5.5.5"),
        # Some proxies add ports.
        ("10.1.2.3", ["198.51.100.1:5123"], "198.51.100.1"),
        ("10.1.2.3", ["[2001:db8:ffff::1]:5123"], "2001:db8:ffff::1"),
        ("10.1.2.3", ["::ffff:198.51.100.1"], "198.51.100.1"),
        # An unreadable address: the last readable one counts.
        ("10.1.2.3", [], "10.1.2.3"),
        ("10.1.2.3", [""], "10.1.2.3"),
        ("10.1.2.3", ["unknown"], "10.1.2.3"),
        ("10.1.2.3", ["198.51.100.1, nonsense\xff, 10.4.4.4"], "10.4.4.4"),
        ("10.1.2.3", [", ".join(["10.1.1.1"] * 1000)], "10.1.1.1"),
        # The header of an untrusted peer is ignored.
        ("198.51.100.1", ["6.6.6.6"], "198.51.100.1"),
        ("11.1.2.3", ["6.6.6.6"], "11.1.2.3"),
        ("2001:db8:2::5", ["6.6.6.6"], "2001:db8:2::5"),
        ("testclient", ["6.6.6.6"], "testclient"),
        (None, ["6.6.6.6"], None),
    ],
)
def test_the_client_is_the_rightmost_untrusted_address(
    peer: str | None, forwarded_for: list[str], client: str | None
) -> None:
    assert client_and_scheme(peer, *forwarded_for)[0] == client


@pytest.mark.parametrize(
    ("peer", "proto", "scheme"),
    [
        ("10.1.2.3", "https", "https"),
        ("10.1.2.3", "HTTPS", "https"),
        ("10.1.2.3", "http, https", "https"),
        ("10.1.2.3", "https, http", "http"),
        ("10.1.2.3", "gopher", "http"),
        ("10.1.2.3", None, "http"),
        ("198.51.100.1", "https", "http"),
    ],
)
def test_the_scheme_is_taken_from_trusted_proxies_only(peer: str, proto: str | None, scheme: str) -> None:
    assert client_and_scheme(peer, proto=proto)[1] == scheme


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("::ffff:198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("a socket", ""),
        (None, ""),
    ],
)
def test_a_client_network_is_an_ipv4_address_or_an_ipv6_64(peer: str | None, network: str) -> None:
    assert client_network(scope(peer)) == network


@pytest.mark.parametrize(
    ("proxies", "headers", "secure"),
    [
        (("127.0.0.1",), {"X-Forwarded-Proto": "https"}, True),
        (("127.0.0.1",), {"X-Forwarded-Proto": "http"}, False),
        (("127.0.0.1",), {}, False),
        ((), {"X-Forwarded-Proto": "https"}, False),
        (("10.0.0.0/8",), {"X-Forwarded-Proto": "https"}, False),
    ],
)
async def test_hsts_is_sent_only_over_https(
    settings: Settings, issuer: LocalIssuer, proxies: tuple[str, ...], headers: dict[str, str], secure: bool
) -> None:
    async with running(settings.model_copy(update={"trusted_proxies": proxies}), issuer) as api:
        for path in "/livez", "/api/v1/tasks":
            response = await api.http.get(path, headers=headers)
            assert response.headers.get("strict-transport-security") == ("max-age=63072000" if secure else None)


async def test_rate_limits_trust_forwarded_addresses_of_known_proxies_only(
    settings: Settings, issuer: LocalIssuer
) -> None:
    async def statuses(proxies: tuple[str, ...], *clients: str) -> list[int]:
        values = {"trusted_proxies": proxies, "rate_limit": "1/hour"}
        async with running(settings.model_copy(update=values), issuer) as api:
            return [(await api.http.get("/", headers={"X-Forwarded-For": client})).status_code for client in clients]

    assert await statuses(("127.0.0.1",), "198.51.100.1", "198.51.100.2", "198.51.100.1") == [200, 200, 429]
    assert await statuses(("127.0.0.1",), "6.6.6.6, 198.51.100.1", "7.7.7.7, 198.51.100.1") == [200, 429]
    assert await statuses((), "198.51.100.1", "198.51.100.2") == [200, 429]
