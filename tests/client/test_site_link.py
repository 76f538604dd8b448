"""site.yaml, section `link`: the way to the coordinator, and no password in it."""

from __future__ import annotations

import pytest

from client.config import SiteConfig
from common.config import ConfigFileError, parse

TEXT = """\
format: wardround-site/1
site: st-mary
data: {files: [notes.csv]}
state: state
budget: {epsilon: 8, delta: 1e-5}
ceilings: {epsilon: 3, rounds: 100, approved_studies: []}
"""


def link(text: str):
    return parse(f"{TEXT}link: {text}\n", "site.yaml", SiteConfig).link


def test_without_a_section_nothing_is_limited() -> None:
    found = parse(TEXT, "site.yaml", SiteConfig).link
    assert (found.proxy, found.bits_per_second, found.hours) == (None, None, None)


def test_a_proxy_a_cap_and_a_window_are_read() -> None:
    found = link("{proxy: 'http://proxy:3128', megabits: 0.5, window: {from: 22, to: 6}}")
    assert found.proxy == "http://proxy:3128"
    assert (found.bits_per_second, found.hours) == (500_000, (22, 6))


WRONG = [
    ("{proxy: 'http://user:secret@proxy:3128'}", "without a password"),
    ("{proxy: 'https://proxy:3128'}", "must be http://host:port"),
    ("{proxy: proxy:3128}", "must be http://host:port"),
    ("{proxy: 'http://proxy'}", "must be host:port"),
    ("{megabits: 0}", "must be greater than 0"),
    ("{megabits: .inf}", "must be a finite number"),
    ("{window: {from: 5, to: 5}}", "the window is empty"),
    ("{window: {from: 24, to: 5}}", "link.window.from: must be at most 23"),
    ("{window: {from: 5}}", "link.window.to: is missing"),
    ("{window: {form: 5, to: 6}}", "link.window.form: unknown key (did you mean from?)"),
    ("{window: {start: 5, end: 6}}", "unknown key (known here: from, to)"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_link_that_cannot_be_meant_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        link(text)
    assert message in caught.value.message
    assert caught.value.message.startswith("site.yaml:7:")
