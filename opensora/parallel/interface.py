"""The network interface by which the hosts of a job reach each other."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping

import psutil


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name gloo's network interface in `environment`, for a job over several hosts; what is set already stays.

    Left alone, gloo listens where the host's own name points, which is 127.0.1.1 on a Debian host and 127.0.0.1 in many
    containers: no other host gets there. NCCL finds its way by itself.
    """
    ranks, here = (int(environment.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks == here or "GLOO_SOCKET_IFNAME" in environment or "MASTER_ADDR" not in environment:
        return
    name = interface_towards(environment["MASTER_ADDR"])
    if name is not None:
        environment["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str | None:
    """The interface that packets for `host` leave by.

    On `host` itself that can be the loopback: then the one of the default route, or the only one that is up. None if
    there are several and no route, or `host` has no address.
    """
    somewhere_outside = "192.0.2.1"  # for documentation, RFC 5737; nothing is sent
    for target in (host, somewhere_outside):
        address = _source_address(target)
        if address is not None and not ipaddress.ip_address(address).is_loopback:
            return next((name for name, own in _addresses() if own == address), None)
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    names = {name for name, own in _addresses() if name in up and not ipaddress.ip_address(own).is_loopback}
    return names.pop() if len(names) == 1 else None


def _source_address(host: str) -> str | None:
    """The address of this host that it talks to `host` from."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of a datagram socket: chooses the route, sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def _addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address) of all interfaces."""
    return [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    ]
