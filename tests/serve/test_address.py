"""Which machines can reach a server: a mistake here opens a model to everyone on the network."""

import os

import pytest

from atomtune.serve.address import ask_without_proxy, only_this_machine, own_address


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_loopback_addresses_are_reached_from_this_machine_only(host):
    assert only_this_machine(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.7", "fe80::1", "128.0.0.1", "a-name", "localhost.example"]
)
def test_any_other_address_or_name_may_be_reached_by_others(host):
    assert not only_this_machine(host)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("192.168.0.7", "192.168.0.7"),
        ("localhost", "localhost"),
    ],
)
def test_a_server_is_asked_at_an_address_that_a_url_can_hold(host, address):
    assert own_address(host) == address


@pytest.mark.parametrize("before", [None, "example.org"])
def test_own_servers_are_asked_without_a_proxy_and_earlier_exceptions_stay(monkeypatch, before):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv("NO_PROXY", before)
    ask_without_proxy("192.168.0.7")
    hosts = [*([before] if before else []), "localhost", "127.0.0.1", "192.168.0.7"]
    assert os.environ["no_proxy"].split(",") == os.environ["NO_PROXY"].split(",") == hosts
