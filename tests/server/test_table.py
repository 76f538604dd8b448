"""The table a person watches: every number it must show, on a terminal and in a pipe."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from server.table import (
    LiveTable,
    PlainLines,
    RoundSummary,
    RunView,
    Silent,
    amount,
    duration,
    epsilon_range,
    time_left,
)

SITES = tuple(f"site-{i:02d}" for i in range(1, 11))


def summary(number, **override):
    values = {
        "round": number,
        "kind": "train",
        "cohort": SITES,
        "survivors": SITES[:9],
        "dropouts": SITES[9:],
        "quorum": 7,
        "epsilon": dict.fromkeys(SITES, (0.15 * number, 3.0)),
        "bytes_up": 58_000,
        "seconds": 2.0,
    }
    return RoundSummary(**{**values, **override})


def drive(view: RunView):
    view.round_started(1, "train", SITES, 7)
    view.phase("upload", 4, 10, SITES[4:])
    view.round_completed(summary(1))
    view.measured(1, 1.25, 0.5125, noise=0.071)
    view.round_started(2, "train", SITES, 7)
    view.round_aborted(2, "train", "WR-5001: 6 survivors, 7 needed", SITES[:4])
    view.round_completed(summary(3, epsilon={}, dropouts=()))
    view.measured(3, None, None, noise=None)
    view.finish("verdict: 9 masked, 0 readable")


def screen(view_width=100, **options):
    console = Console(file=io.StringIO(), force_terminal=False, width=view_width, **options)
    return console, LiveTable(console, title="demo", rounds=20)


def test_lines_in_a_pipe_carry_every_number():
    stream = io.StringIO()
    drive(PlainLines(stream, rounds=20))
    assert stream.getvalue().splitlines() == [
        (
            "round 1/20  cohort 10  survivors 9 (lost site-10)  quorum 7"
            "  epsilon 0.15 of 3  up 58.0 kB  2.0 s, left 38 s"
        ),
        (
            "  model after round 1: loss 1.250  accuracy 0.512"
            "  (privacy noise on the accuracy: about ±0.07)"
        ),
        (
            "round 2/20  aborted: WR-5001: 6 survivors, 7 needed; waited for site-01, site-02, site-03"
            " and 1 more"
        ),
        "round 3/20  cohort 10  survivors 9  quorum 7  up 58.0 kB  2.0 s, left 34 s",
        "verdict: 9 masked, 0 readable",
    ]


def test_the_table_shows_every_number_and_ends_with_the_verdict():
    console, view = screen()
    drive(view)
    text = console.file.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert [
        "round",
        "cohort",
        "survivors",
        "quorum",
        "loss",
        "accuracy",
        "ε",
        "of",
        "cap",
        "bytes",
        "up",
        "left",
    ] in rows
    assert [
        "1",
        "10",
        "9",
        "-site-10",
        "7",
        "1.250",
        "0.512",
        "0.15",
        "of",
        "3",
        "58.0",
        "kB",
        "38",
        "s",
    ] in rows
    assert ["2", "aborted"] in rows
    assert "round 2 aborted: WR-5001: 6 survivors, 7 needed; waited for site-01" in text
    assert text.splitlines()[-1] == "verdict: 9 masked, 0 readable"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_nothing_is_cut_off_on_an_ordinary_terminal(width):
    console, view = screen(width)
    sites = {site: (2.3 + i / 50, 3.0) for i, site in enumerate(SITES)}
    view.round_completed(summary(17, epsilon=sites, bytes_up=330_000_000))
    view.finish("done")
    text = console.file.getvalue()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "2.30-2.48 of 3" in text
    assert "330 MB" in text


def test_a_running_phase_names_who_is_waited_for():
    console, view = screen()
    view.round_started(3, "train", SITES, 7)
    view.phase("upload", 4, 10, SITES[6:])
    with console.capture() as capture:
        console.print(view._render())
    assert (
        "round 3 of 20: upload 4 of 10, waiting for site-07, site-08, site-09 and 1 more"
        in capture.get()
    )
    view.close()


def test_many_rounds_stay_on_one_screen():
    console, view = screen()
    for number in range(1, 101):
        view.round_completed(summary(number))
    with console.capture() as capture:
        console.print(view._render())
    text = capture.get()
    assert len(text.splitlines()) <= 22
    assert "86 earlier" in text
    view.finish("done")


def test_a_title_or_reason_cannot_inject_markup():
    console, view = screen()
    view.round_aborted(1, "train", "[bold]x[/bold] [/nonsense]")
    view.finish("[red]verdict[/red]")
    text = console.file.getvalue()
    assert "[bold]x[/bold] [/nonsense]" in text
    assert "[red]verdict[/red]" in text


def test_the_table_starts_no_thread():
    before = threading.active_count()
    _, view = screen()
    view.round_started(1, "train", SITES, 7)
    assert threading.active_count() == before
    view.close()


def test_silence_shows_nothing(capsys):
    drive(Silent())
    assert capsys.readouterr() == ("", "")


def test_epsilon_is_one_pair_or_least_and_most():
    assert epsilon_range({}) == ""
    assert epsilon_range({"a": (1.0, 3.0), "b": (1.0, 3.0)}) == "1.00 of 3"
    assert epsilon_range({"a": (0.9, 3.0), "b": (1.2, 3.0)}) == "0.90-1.20 of 3"
    assert epsilon_range({"a": (0.9, 3.0), "b": (1.2, 8.0)}) == "0.90-1.20 of 3+"


def test_time_left_is_the_median_of_recent_rounds():
    assert time_left([], 5) == "?"
    assert time_left([1.0], 0) == "done"
    assert time_left([100.0, 2.0, 2.0, 2.0, 50.0, 2.0], 10) == "20 s"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (5800, "5.8 kB"),
        (115_960, "116 kB"),
        (999_900, "1.0 MB"),
        (3.3e8, "330 MB"),
        (2.5e12, "2500 GB"),
    ],
)
def test_amounts_are_short(count, text):
    assert amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42, "42 s"),
        (180, "3 min"),
        (5000, "83 min"),
        (9000, "2.5 h"),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
