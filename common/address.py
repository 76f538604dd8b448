"""Where a machine is reached: host names, IP addresses and `host:port`, as people write them."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Final

from pydantic import AfterValidator, Field

__all__ = ["Address", "Host", "Port", "is_loopback", "joined_address", "split_address"]

_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MAX_NAME: Final = 253
_MAX_PORT: Final = 65535


def is_ip(text: str) -> bool:
    """Whether `text` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def _host(text: str) -> str:
    if is_ip(text) and "%" not in text:
        return text
    labels = text.split(".")
    # A last label of digits would be a mistyped IPv4 address, which some resolvers still read.
    named = len(text) <= _MAX_NAME and not labels[-1].isdigit()
    if not named or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"must be a host name or an IP address (got {text[:70]!a})")
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`; an IPv6 host stands in brackets. Raises ValueError."""
    host, _, digits = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    plain = digits.isascii() and digits.isdigit() and len(digits) <= len(str(_MAX_PORT))
    if not plain or bracketed != (":" in host) or not 1 <= int(digits) <= _MAX_PORT:
        raise ValueError(f"must be host:port (got {text[:70]!a})")
    return _host(host), int(digits)


def joined_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(text: str) -> str:
    split_address(text)
    return text


Host = Annotated[str, Field(min_length=1, max_length=_MAX_NAME), AfterValidator(_host)]
Port = Annotated[int, Field(ge=1, le=_MAX_PORT)]
Address = Annotated[str, Field(min_length=3, max_length=300), AfterValidator(_address)]
