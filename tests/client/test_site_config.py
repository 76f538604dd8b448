"""site.yaml: the hospital's own limits fail closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.config import SiteConfig
from common.config import ConfigFileError, parse

TEXT = """\
format: wardround-site/1
site: st-mary
data: {files: [notes.csv]}
state: state
budget: {epsilon: 8, delta: 1e-5}
ceilings:
  epsilon: 3
  rounds: 100
  approved_studies: []
"""


def site(text: str) -> SiteConfig:
    return parse(text, "site.yaml", SiteConfig)


def complaint(text: str) -> str:
    with pytest.raises(ConfigFileError) as caught:
        site(text)
    return caught.value.message.removeprefix("site.yaml:")


def test_an_empty_list_approves_nothing_and_the_word_any_everything() -> None:
    assert site(TEXT).ceilings.approved_studies == ()
    assert site(TEXT.replace("[]", "any")).ceilings.approved_studies is None
    digest = "ab" * 32
    assert site(TEXT.replace("[]", f"[{digest}]")).ceilings.approved_studies == (digest,)


@pytest.mark.parametrize("value", ["", "null", "~", "all", "[any]", "[AB]", "5", "{}"])
def test_nothing_but_the_word_any_opens_the_list(value: str) -> None:
    assert complaint(TEXT.replace("[]", value)).startswith("9:")


def test_the_list_of_studies_must_be_written() -> None:
    text = TEXT.replace("  approved_studies: []\n", "")
    assert complaint(text) == "6:1: ceilings.approved_studies: is missing"


def test_one_study_may_not_ask_for_more_than_all_studies_together() -> None:
    message = "7:12: ceilings.epsilon: is more than all studies together may spend (8)"
    assert complaint(TEXT.replace("epsilon: 3", "epsilon: 9")) == message
    assert site(TEXT.replace("epsilon: 3", "epsilon: 8")).ceilings.epsilon == 8


def test_the_floor_of_hospitals_cannot_go_below_three() -> None:
    text = TEXT + "  minimum_sites: 2\n"
    assert complaint(text) == "10:18: ceilings.minimum_sites: must be at least 3 (got 2)"


def test_privacy_is_required_unless_somebody_says_otherwise() -> None:
    assert site(TEXT).ceilings.require_privacy is True


def test_paths_are_meant_relative_to_the_file() -> None:
    config = site(TEXT)
    assert config.state_folder("/etc/wr/site.yaml") == Path("/etc/wr/state")
    assert config.kill_switch_file("/etc/wr/site.yaml") == Path("/etc/wr/state/stop")
    own = site(TEXT + "kill_switch: /run/stop\n")
    assert own.kill_switch_file("/etc/wr/site.yaml") == Path("/run/stop")
