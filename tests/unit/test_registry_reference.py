"""Which registry a name means, and what may be connected to for it."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import InvalidCommand, PullFailed
from worker.images.reference import parse_reference
from worker.images.registry.addresses import NOT_PUBLIC, is_loopback_name, names_host, refused
from worker.images.registry.reference import registry_image

DIGEST = "sha256:" + "a" * 64
HUB = "docker.io"


@pytest.mark.parametrize(
    ("name", "host", "repository", "tag"),
    [
        ("alpine", HUB, "library/alpine", "latest"),
        ("alpine:3.20", HUB, "library/alpine", "3.20"),
        ("team/app", HUB, "team/app", "latest"),
        ("docker.io/alpine", HUB, "library/alpine", "latest"),
        ("index.docker.io/team/app:1", HUB, "team/app", "1"),
        ("registry-1.docker.io/library/alpine", HUB, "library/alpine", "latest"),
        ("ghcr.io/a/b/c:1", "ghcr.io", "a/b/c", "1"),
        ("localhost/app", "localhost", "app", "latest"),
        ("localhost:5000/app:2", "localhost:5000", "app", "2"),
        ("HOST/app", "host", "app", "latest"),
        ("Registry.Example:443/app", "registry.example:443", "app", "latest"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000", "app", "latest"),
        ("localhostile/app", HUB, "localhostile/app", "latest"),
    ],
)
def test_where_a_name_leads(name: str, host: str, repository: str, tag: str) -> None:
    found = registry_image(name)
    assert (found.host, found.repository, found.tag) == (host, repository, tag)
    assert found.reference == tag
    assert registry_image(f"{name}@{DIGEST}").reference == DIGEST


def test_docker_hub_answers_elsewhere() -> None:
    assert registry_image("alpine").endpoint == "registry-1.docker.io"
    assert registry_image("ghcr.io/a/b").endpoint == "ghcr.io"
    assert str(registry_image("alpine:3")) == "docker.io/library/alpine:3"
    assert str(registry_image(f"a.b/c:3@{DIGEST}")) == f"a.b/c@{DIGEST}"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (DIGEST, PullFailed, "names no registry"),
        (f"alpine@sha512:{'a' * 128}", PullFailed, "sha512 are not supported"),
        ("a.b:0/c", InvalidCommand, "no usable registry"),
        ("a.b:65536/c", InvalidCommand, "no usable registry"),
        ("a b", InvalidCommand, "image"),
        ("../etc", InvalidCommand, "image"),
        ("a.b/../../c", InvalidCommand, "image"),
        ("user:pass@host/app", InvalidCommand, "image"),
    ],
)
def test_names_that_lead_nowhere(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        registry_image(name)
    assert getattr(caught.value, "field", None) == "image"


def test_a_name_with_a_digest_is_not_its_tag() -> None:
    assert parse_reference("app:1").key != parse_reference(f"app:1@{DIGEST}").key
    assert parse_reference(f"app:1@{DIGEST}").key == parse_reference(f"app@{DIGEST}").key


# -- addresses


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses(address: str) -> None:
    assert refused(address, private=False) is None


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1", "::ffff:10.0.0.1"],
)
def test_private_addresses_only_for_a_named_registry(address: str) -> None:
    assert refused(address, private=False) == NOT_PUBLIC
    assert refused(address, private=True) is None


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
        "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192",
        "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_nothing_connects_to(address: str) -> None:
    assert refused(address, private=True) is not None


@given(st.ip_addresses())
def test_every_address_has_an_answer(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    strict, named = refused(str(address), private=False), refused(str(address), private=True)
    assert named is None or strict is not None  # naming a registry never forbids more


@pytest.mark.parametrize(
    ("pattern", "host", "named"),
    [
        ("*", "registry.lan", False),
        ("*/tools:*", "registry.lan", False),
        ("*:*/x", "registry.lan:5000", False),
        ("?*/x", "registry.lan", False),
        ("registry.lan", "registry.lan", False),
        ("registry.lan/*", "registry.lan", True),
        ("registry.lan/*", "registry.lan:5000", False),
        ("registry.lan:*/team/*", "registry.lan:5000", True),
        ("*.lan/*", "registry.lan", True),
        ("Registry.LAN/*", "registry.lan", True),
        ("localhost*/*", "localhost:5000", True),
    ],
)
def test_patterns_that_name_a_registry(pattern: str, host: str, named: bool) -> None:
    assert names_host((pattern,), host) is named


def test_this_machine() -> None:
    assert all(map(is_loopback_name, ("localhost", "127.0.0.1", "127.9.9.9")))
    assert not any(map(is_loopback_name, ("localhost.example", "10.0.0.1", "example")))
