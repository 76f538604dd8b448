"""The two files of an enrolment come from strangers: nothing in them does more than be refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.errors import Code, ConfigError, WardroundError
from common.invite import MAX_BYTES, Invite, Join, parse_small


def code_of(text: str, model: type[Invite | Join]) -> Code:
    with pytest.raises(ConfigError) as caught:
        parse_small(text, "f", model)
    return caught.value.code


@pytest.fixture
def files(lake):
    invite = lake.invite()
    invite.save(lake.root / "a.invite")
    lake.join(invite).save(lake.root / "a.join")
    return lake.root / "a.invite", lake.root / "a.join"


def test_both_files_come_back_as_they_were_and_are_for_their_owner_only(files, lake) -> None:
    for path, model in zip(files, (Invite, Join), strict=True):
        assert path.stat().st_mode & 0o777 == 0o600
        again = model.load(path)
        again.save(lake.root / "again")
        assert (lake.root / "again").read_bytes() == path.read_bytes()


def test_a_name_of_any_script_survives_the_file(lake) -> None:
    invite = lake.invite("koln", name="Klinikum Köln 医院 \U0001f3e5")
    invite.save(lake.root / "k.invite")
    assert Invite.load(lake.root / "k.invite").verified(lake.now) == invite


def test_one_file_for_the_other_is_refused(files) -> None:
    for path, model in zip(files, (Join, Invite), strict=True):
        assert code_of(path.read_text(), model) is Code.ENROL_FILE


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"token": "AB" * 32},
        {"token": 5},
        {"coordinator": "ab"},
        {"url": "localhost"},
        {"url": "a b:1"},
        {"site": "../x"},
        {"name": "a\x1b[31m"},
        {"expires": -1},
        {"expires": "soon"},
        {"version": True},
        {"ca": "x" * 9000},
        {"ca": "\u00e9"},
        {"signature": None},
        {"format": "wardround-invite/2"},
    ],
)
def test_an_invite_that_says_anything_else_is_refused(files, change) -> None:
    told = json.loads(files[0].read_text())
    parse_small(json.dumps(told), "f", Invite)  # control
    assert code_of(json.dumps(told | change), Invite) is Code.ENROL_FILE
    for key in told:
        lacking = {name: value for name, value in told.items() if name != key}
        assert code_of(json.dumps(lacking), Invite) is Code.ENROL_FILE


def test_a_key_written_twice_is_refused(files) -> None:
    text = files[0].read_text().replace('"site":', '"site": "evil", "site":', 1)
    assert code_of(text, Invite) is Code.ENROL_FILE
    assert json.loads(text)["site"] == "st-mary"  # control: a plain reader takes the second


def test_what_is_too_long_missing_or_no_file_is_refused_unread(files, tmp_path) -> None:
    path = files[0]
    path.write_bytes(path.read_bytes() + b" " * MAX_BYTES)
    with pytest.raises(ConfigError, match="longer than 16 KiB") as caught:
        Invite.load(path)
    assert caught.value.code is Code.ENROL_FILE
    assert code_of(" " * (MAX_BYTES + 1), Join) is Code.ENROL_FILE
    path.write_bytes(b"\xff\xfe\x00")
    for unreadable in (path, tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError) as caught:
            Join.load(unreadable)
        assert caught.value.code is Code.CONFIG_UNREADABLE


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300))
@example("[" * 5000)
@example('{"format": "wardround-join/1"}')
def test_random_text_is_never_anything_but_refused(text: str) -> None:
    for model in (Invite, Join):
        with pytest.raises(ConfigError):
            parse_small(text, "f", model)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_file_is_refused_and_never_half_believed(
    files, lake, data: st.DataObject
) -> None:
    which = data.draw(st.integers(0, 1))
    told = json.loads(files[which].read_text())
    key = data.draw(st.sampled_from(sorted(told)))
    text = json.dumps(told | {key: data.draw(JSONISH)}, ensure_ascii=False)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(text)))
        text = text[:cut] + data.draw(st.text(max_size=4)) + text[cut:]
    token = bytes.fromhex(json.loads(files[0].read_text())["token"])
    try:
        read = parse_small(text, "f", (Invite, Join)[which])
        if read.model_dump() == told:
            return
        if isinstance(read, Invite):
            read.verified(lake.now)
        else:
            read.check_proof(token)
    except WardroundError:
        return
    pytest.fail("a changed file was believed")
