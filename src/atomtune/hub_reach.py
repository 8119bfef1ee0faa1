"""Hub reach: checks once whether the hub can be reached; if not, the library would retry for 46 seconds."""

import contextlib
import os
import socket
import urllib.request
from collections.abc import Iterator
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants

#: Seconds to wait for a connection.
PATIENCE = 5.0
#: Whether the user has set HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE).
OFFLINE_BY_CHOICE = constants.is_offline_mode()


def stay_offline_if_unreachable() -> None:
    """Switch the hub's library to offline mode if the hub cannot be reached; it then reads only its cache."""
    if not constants.is_offline_mode() and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes


@contextlib.contextmanager
def tried_again_afterwards() -> Iterator[None]:
    """After this context the hub is tried again if it could not be reached: a notebook may be online by then."""
    offline, in_environment = constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if in_environment is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = in_environment
        reachable.cache_clear()


def endpoint_shown() -> str:
    """The hub's address for a message, without user:token@."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rpartition("@")[2]


@cache
def reachable(endpoint: str) -> bool:
    """Whether a connection to this address can be opened.

    Behind a proxy that cannot be checked, so the answer is True.
    """
    parts = urlsplit(endpoint)
    if not parts.hostname:
        return True
    proxies = urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(parts.hostname):
        return True
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname, port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
