"""The operator's log: events and allowed keys; nothing a patient said, nothing secret."""

from __future__ import annotations

import json
import os
import stat
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, RefusedError, StorageError
from common.logs import ALLOWED, DROPPED, REDACTED, open_log, refined

NOTE = "Patient John Doe, crushing chest pain since Tuesday"


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_one_json_object_per_line(tmp_path) -> None:
    log = open_log(tmp_path / "log.jsonl", strict=True)
    log.info("round.masked_sent", site="st-mary", round=3, bytes=72, epsilon=1.5)
    log.warning("round.dropped", site="lakeside")
    log.debug("round.noticed", site="lakeside")
    first, second = written(tmp_path / "log.jsonl")
    assert {**first, "timestamp": None} == {
        "event": "round.masked_sent",
        "site": "st-mary",
        "round": 3,
        "bytes": 72,
        "epsilon": 1.5,
        "level": "info",
        "timestamp": None,
    }
    assert first["timestamp"].endswith("Z")
    assert second["level"] == "warning"


def test_a_key_that_is_not_allowed_is_dropped_with_its_value_and_its_name(tmp_path) -> None:
    log = open_log(tmp_path / "log.jsonl")
    log.info("round.trained", note=NOTE, **{NOTE: 1})
    (line,) = written(tmp_path / "log.jsonl")
    assert line["dropped"] == DROPPED
    assert "John" not in json.dumps(line)
    assert "note" not in line


def test_in_tests_a_key_that_is_not_allowed_raises(tmp_path) -> None:
    log = open_log(tmp_path / "log.jsonl", strict=True)
    with pytest.raises(ValueError, match="may not hold"):
        log.info("round.trained", note=1)
    with pytest.raises(ValueError, match="may not hold"):
        log.info("a sentence about something")
    with pytest.raises(ValueError, match="may not hold"):
        log.info("round.trained", site=NOTE)


@pytest.mark.parametrize("key", ["private_key", "seed", "share", "self_mask", "password", "nonce"])
def test_a_secret_is_redacted(key: str) -> None:
    assert refined({"event": "a.b", key: "0badc0de"}, strict=True) == {
        "event": "a.b",
        key: REDACTED,
    }


def test_no_allowed_key_looks_like_a_secret() -> None:
    from common.logs import _SECRET

    assert [key for key in ALLOWED if _SECRET.search(key)] == []


def test_an_exception_is_logged_by_code_or_type_and_never_by_its_text(tmp_path) -> None:
    log = open_log(tmp_path / "log.jsonl", strict=True)
    log.info("round.refused", error=RefusedError(Code.APPROVAL_STOPPED, NOTE))
    log.info("round.refused", error=ValueError(NOTE), code=Code.APPROVAL_STOPPED)
    try:
        {}[NOTE]
    except KeyError:
        log.exception("round.failed")
    text = (tmp_path / "log.jsonl").read_text()
    assert [line["error"] for line in written(tmp_path / "log.jsonl")] == [
        "WR-3101",
        "ValueError",
        "KeyError",
    ]
    assert NOTE not in text
    assert "Traceback" not in text


def test_a_sentence_is_not_an_event_and_text_is_not_a_value() -> None:
    assert refined({"event": NOTE}, strict=False) == {"event": DROPPED}
    assert refined({"event": "a.b", "site": NOTE}, strict=False)["site"] == DROPPED
    assert refined({"event": "a.b", "site": b"raw"}, strict=False)["site"] == DROPPED
    assert refined({"event": "a.b", "sites": ["a", NOTE]}, strict=False)["sites"] == DROPPED
    assert refined({"event": "a.b", "sites": ("a", "b")}, strict=True)["sites"] == ["a", "b"]


@given(
    st.dictionaries(
        st.text(max_size=12) | st.sampled_from(sorted(ALLOWED)),
        st.none() | st.text() | st.binary() | st.integers() | st.lists(st.text(), max_size=3),
        max_size=6,
    )
)
def test_whatever_is_logged_only_tokens_and_numbers_come_out(fields: dict) -> None:
    clean = refined(dict(fields), strict=False)
    letters = set(string.ascii_letters + string.digits + "_.:+-<>")
    for key, value in clean.items():
        assert key in ALLOWED or key == "dropped" or value == REDACTED
        for item in value if isinstance(value, list) else [value]:
            assert item is None or isinstance(item, bool | int | float | str)
            assert not isinstance(item, str) or set(item) <= letters


def test_the_log_file_is_readable_by_its_owner_alone(tmp_path) -> None:
    open_log(tmp_path / "log.jsonl")
    assert stat.S_IMODE((tmp_path / "log.jsonl").stat().st_mode) == 0o600


def test_a_log_that_cannot_be_opened_is_a_storage_error(tmp_path) -> None:
    with pytest.raises(StorageError) as caught:
        open_log(tmp_path / "gone" / "log.jsonl")
    assert caught.value.code is Code.LOG_OPEN


def test_a_full_disk_loses_log_lines_and_says_how_many_and_never_stops_a_round(
    tmp_path, monkeypatch
) -> None:
    path = tmp_path / "log.jsonl"
    log = open_log(path, strict=True)
    write = os.write

    def full(_descriptor: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    log.info("round.started", round=1)
    monkeypatch.setattr(os, "write", full)
    log.info("round.started", round=2)
    monkeypatch.setattr(os, "write", write)
    log.info("round.started", round=3)
    cut, lost, third = path.read_text().splitlines()
    assert len(cut) == 10
    assert json.loads(lost) == {"event": "log.lines_lost", "lost_lines": 2}
    assert json.loads(third)["round"] == 3


def test_a_rotated_log_is_followed(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    log = open_log(path, strict=True)
    log.info("round.started", round=1)
    path.rename(tmp_path / "log.1")
    log.info("round.started", round=2)
    assert [line["round"] for line in written(path)] == [2]
