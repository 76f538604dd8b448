"""Host names and addresses, as people write them, and nothing that a resolver reads otherwise."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from common.address import Address, Host, is_loopback, joined_address, split_address

GOOD = [
    ("localhost:1", ("localhost", 1)),
    ("wr.example.org:8443", ("wr.example.org", 8443)),
    ("10.0.0.7:65535", ("10.0.0.7", 65535)),
    ("[::1]:443", ("::1", 443)),
]


@pytest.mark.parametrize(("text", "parts"), GOOD)
def test_an_address_comes_apart_and_together_again(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts
    assert joined_address(*parts) == text
    assert TypeAdapter(Address).validate_python(text) == text


BAD = ["", "h", "h:", ":1", "h:0", "h:65536", "h:99999999", "h:-1", "h:+1", "h:\u0661", "::1:443"]
BAD += ["[h]:1", "[::1:1", "a b:1", "h:1/x", "http://h:1", "u@h:1", "-h:1", "h-:1", "a..b:1"]
BAD += ["1.2.3:1", "1.2.3.4.5:1", "256.1.1.1:1", "[fe80::1%eth0]:1", "a_b:1", "\xe9:1", "h:1\n"]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        split_address(text)
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(text)


@pytest.mark.parametrize("text", ["", "a" * 64, "a." * 127 + "aa", "127.1", "0x7f000001.1", "*.a"])
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Host).validate_python(text)


def test_loopback_is_told_from_everything_else() -> None:
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"))
    others = ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example")  # noqa: S104
    assert not any(is_loopback(host) for host in others)
