"""Address: which machines can reach a server that listens at an address."""

import contextlib
import ipaddress
import os


def only_this_machine(host: str) -> bool:
    """Whether a server that listens at `host` (a name or an address) can be reached only from this machine."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def own_address(host: str) -> str:
    """The address at which this machine reaches a server that listens at `host`; IPv6 in brackets."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def ask_without_proxy(host: str) -> None:
    """Make this process reach its own servers without a proxy, even if http_proxy is set."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join([*([before] if before else []), "localhost", "127.0.0.1", host])
