"""The run's own memory: what became of every round, and what was seen on the wire."""

from __future__ import annotations

import os

import numpy as np
import pytest

from common.errors import Code, StorageError
from common.metrics import ClassScoring, words_from_counts
from server.history import History
from server.network import WireTap, _uniform
from server.report import RoundResult

LABELS = ("a", "b")


def entry(number, turn=None, *, kind="train", code=None):
    return RoundResult(
        round=number,
        turn=number if turn is None else turn,
        kind=kind,
        cohort=3,
        survivors=3,
        dropouts=(),
        metrics=None,
        epsilon=0.5,
        bytes_up=10,
        seconds=0.1,
        code=code,
    )


def quality(hits):
    counts = np.array([hits, 10 - hits, 0, 10, 4.0])
    return ClassScoring(tuple(LABELS), 8.0).read(words_from_counts(counts))


def test_metrics_stand_at_the_round_that_made_the_model(tmp_path):
    history = History(tmp_path / "h.jsonl")
    history.add(entry(1))
    history.measured(1, quality(9))
    history.add(entry(2))
    history.add(entry(3, 3, kind="evaluate"))
    history.measured(2, quality(4))
    for seen in (history, History(tmp_path / "h.jsonl")):
        measured = [r.metrics and r.metrics.primary for r in seen.rounds]
        assert measured == [pytest.approx(0.95), pytest.approx(0.7), None]
        assert seen.of_model(2) == quality(4)


def test_a_burned_round_never_gets_the_metrics_of_its_next_try(tmp_path):
    history = History(tmp_path / "h.jsonl")
    history.add(entry(1, 1, code="WR-5001"))
    history.add(entry(2, 1))
    history.measured(1, quality(9))
    assert [r.metrics is None for r in history.rounds] == [True, False]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_cut_off_and_written_again(tmp_path, cut):
    path = tmp_path / "h.jsonl"
    history = History(path)
    history.add(entry(1))
    history.add(entry(2))
    os.truncate(path, path.stat().st_size - cut)
    history = History(path)
    assert [history.knows(number) for number in (1, 2)] == [True, False]
    history.add(entry(2))
    assert [r.round for r in History(path).rounds] == [1, 2]


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "h.jsonl"
    history = History(path)
    history.add(entry(1))
    write = os.write

    def half(handle, data):
        write(handle, bytes(data)[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StorageError) as caught:
        history.add(entry(2))
    monkeypatch.undo()
    assert caught.value.code is Code.JOURNAL_WRITE
    assert [r.round for r in History(path).rounds] == [1]


def test_what_the_tap_counted_survives_its_process(tmp_path):
    first = WireTap(10**6, tmp_path / "wire")
    first.masked, first.plain, first.bytes_up = 12, 1, 34_567
    first._keep()
    again = WireTap(10**6, tmp_path / "wire")
    assert (again.masked, again.plain, again.bytes_up) == (12, 1, 34_567)
    assert (tmp_path / "wire").stat().st_size == 63, "a fixed width: it never needs more room"


@pytest.mark.parametrize("size", [24, 51, 80, 102, 208, 1155, 9240, 70_000])
def test_random_planes_look_masked(size):
    assert all(_uniform(memoryview(os.urandom(size))) for _ in range(50))


@pytest.mark.parametrize(
    ("count", "kind"),
    [(10, "<u8"), (26, "<u8"), (5000, "<u8"), (26, "<u4"), (200, "<u4"), (5000, "<u4")],
)
def test_bare_words_do_not(count, kind):
    noise = np.random.default_rng(0).normal(scale=1e5, size=count).astype(np.int64)
    assert not _uniform(memoryview(noise.astype(kind).tobytes()))
