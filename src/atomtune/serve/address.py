"""Address: who can reach a server that listens there."""

import contextlib
import ipaddress


def only_this_machine(host: str) -> bool:
    """Whether no other machine reaches a server that listens at `host`, a name or an address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def own_address(host: str) -> str:
    """Where this machine asks a server that listens at `host`; IPv6 in brackets."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host
