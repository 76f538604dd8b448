"""Rolled-back models on the screen: how many in a row, and what of them is a new model."""

from __future__ import annotations

import io

import pytest

from server.table import PlainLines, Rollbacks


@pytest.mark.parametrize(
    ("told", "row"),
    [
        ("", 0),
        ("a", 0),
        ("aar", 1),
        ("aar-r", 2),  # the standing model, measured again, ends no row
        ("aar-r-r", 3),
        ("aar-r-", 2),
        ("aar-a", 0),
        ("aar-ar", 1),
        ("ar-r-aar", 1),
    ],
)
def test_a_row_ends_with_the_next_model_that_is_accepted(told, row):
    """a accepted, r rolled back, - the standing model again; from the initial model on."""
    seen = Rollbacks()
    for number, what in enumerate(told):
        seen.measured(number, rejected=what == "r")
    assert seen.row == row


def test_plain_lines_count_rollbacks_from_the_second_on():
    stream = io.StringIO()
    lines = PlainLines(stream, rounds=4)
    for number, accuracy, rejected in ((0, 0.5, 0), (1, 0.1, 1), (2, 0.5, 0), (3, 0.2, 1)):
        lines.measured(number, 0.7, accuracy, noise=None, rejected=bool(rejected))
    said = stream.getvalue().splitlines()
    assert [line.endswith("rolled back") for line in said] == [False, True, False, False]
    assert said[3].endswith("rolled back (2 in a row)")
