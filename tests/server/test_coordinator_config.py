"""coordinator.yaml: where hospitals dial, and where nobody but the operator does."""

from __future__ import annotations

import pytest

from common.config import ConfigFileError, parse
from server.config import CoordinatorConfig

TEXT = "format: wardround-coordinator/1\nstate: s\n"


def config(more: str = "") -> CoordinatorConfig:
    return parse(f"{TEXT}{more}\n", "c.yaml", CoordinatorConfig)


def test_hospitals_dial_the_first_name() -> None:
    assert config().url == "localhost:8443"
    assert config("names: ['::1', a]\nlisten: {port: 443}").url == "[::1]:443"


WRONG = [
    ("admin: {host: 0.0.0.0}", "admin.host: must be a loopback address"),
    ("admin: {host: wr.example.org}", "admin.host: must be a loopback address"),
    ("admin: {port: 8443}", "admin.port: is also the hospitals' port"),
    ("names: []", "names: must list at least 1"),
    ("names: [a, b, a]", "names.2: is listed twice"),
    ("names: ['https://a']", "names.0: must be a host name"),
    ("listen: {port: 0}", "listen.port: must be at least 1"),
    ("listen: {port: 65536}", "listen.port: must be at most 65535"),
    ("admin_token: abc", "unknown key"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_a_coordinator_that_cannot_be_meant_is_refused(more: str, message: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        config(more)
    assert message in caught.value.message
