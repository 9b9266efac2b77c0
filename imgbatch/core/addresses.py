"""Which addresses of the network a manifest may make this process talk to: those that anybody can reach anyway.

Private, loopback and link-local addresses are refused, among them the metadata services that hand credentials to
whoever asks from inside. Names are resolved first and what they resolve to is judged, so that neither a name that
points inside nor an unusual spelling (``0x7f.1``, ``2130706433``) gets through.
"""

from __future__ import annotations

import ipaddress
import socket

from imgbatch.core.access import Refused

_METADATA = frozenset({"168.63.129.16"})
"""Azure's answers on a public address; the others are link-local or private."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def resolve(host: str, port: int, *, private: bool) -> str:
    """The address to connect to.

    Args:
        private: allow every address.

    Raises:
        Refused: the name resolves to an address that is not public, among others perhaps.
        OSError: the name does not resolve.
    """
    addresses = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not private:
        for address in addresses:
            if not is_public(address):
                raise Refused(f"{host} is at {address}, which is no public address")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, and the IPv4 address inside it if there is one, is of the public network."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    is_special = parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified
    return parsed.is_global and not is_special and str(parsed) not in _METADATA
