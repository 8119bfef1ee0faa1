"""Hub reach: whether the hub can be asked at all, found out once; without it the library would retry for 46 seconds."""

import os
import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants

#: Seconds to wait for a connection.
PATIENCE = 5.0
#: Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids asking, as the user set it.
OFFLINE_BY_CHOICE = constants.is_offline_mode()


def stay_offline_if_unreachable() -> None:
    """Put the hub's library into its offline mode where no connection comes about: it then reads its cache alone."""
    if not constants.is_offline_mode() and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that this one starts


def endpoint_shown() -> str:
    """The hub's address for a message: what may stand before its name, user:token@, is not said."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rpartition("@")[2]


@cache
def reachable(endpoint: str) -> bool:
    """Whether a connection to this address can be opened. Behind a proxy only the proxy knows, so that is a yes."""
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
