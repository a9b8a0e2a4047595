"""The address and scheme of the client behind trusted proxies."""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

Network = IPv4Network | IPv6Network

_MAX_HOPS = 20


class TrustedProxies:
    """Reads `X-Forwarded-For` and `X-Forwarded-Proto` of requests that come from `networks`.

    The client is the rightmost address that does not belong to a trusted proxy; addresses left of it can be forged. An
    invalid address ends the search at the proxy that forwarded it.
    """

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(map(network, networks))
        self._is_trusted = lru_cache(4096)(self._look_up)

    def apply(self, scope: Scope) -> None:
        """Set the scope's `client` and `scheme` to those that the trusted proxies forwarded."""
        peer = scope["client"][0] if scope.get("client") else ""
        if not self._is_trusted(peer):
            return
        forwarded_for: list[bytes] = []
        is_socket = scope["type"] == "websocket"
        for name, value in scope["headers"]:
            if name == b"x-forwarded-for":
                forwarded_for.append(value)
            elif name == b"x-forwarded-proto":
                scheme = value.rpartition(b",")[2].strip().lower()
                if scheme in (b"http", b"https"):
                    scope["scheme"] = (scheme.replace(b"http", b"ws") if is_socket else scheme).decode()
        client = peer
        for hop in reversed(b",".join(forwarded_for).decode("latin-1").rsplit(",", _MAX_HOPS)):
            if (address := _address(hop.strip())) is None:
                break
            client = str(address)
            if not self._is_trusted(client):
                break
        if client != peer:
            scope["client"] = (client, 0)

    def _look_up(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)


def network(text: str) -> Network:
    """An address or a network in CIDR notation. Raises ValueError, also for a network of all addresses."""
    found = ip_network(text)
    if not found.prefixlen:
        raise ValueError("a network of all addresses would let clients forge theirs")
    return found


def client_network(scope: Scope) -> str:
    """The IPv4 address or IPv6 /64 of the client. A client can choose any address within its /64."""
    return _client_network(scope["client"][0] if scope.get("client") else "")


@lru_cache(4096)
def _client_network(host: str) -> str:
    address = _address(host)
    if isinstance(address, IPv6Address):
        return str(IPv6Network((int(address), 64), strict=False))
    return str(address or "")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address with or without a port. An IPv4-mapped IPv6 address becomes an IPv4 address."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
