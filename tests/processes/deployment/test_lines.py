"""Lines that are cut, silent, thin or broken in mid-transfer: the run goes on, nobody is lost."""

from __future__ import annotations

import time

import pytest
from federation import ended, require_whole, settled

SHORT = {"deadlines": {"handshake_s": 4, "train_s": 4, "upload_s": 4, "agree_s": 4, "unmask_s": 4}}
AWAY_S = 6


def taken(fed, site):
    """The completed rounds that a hospital was part of."""
    return [number for number, names in fed.survivors().items() if site in names]


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_a_line_away_for_longer_than_a_phase_costs_rounds_and_no_run(federation, how):
    """Six minutes and a deadline of minutes, scaled down to seconds."""
    fed = federation(rounds=300, study=SHORT)
    fed.start()
    fed.wait_rounds(2)
    site = fed.sites[1]
    getattr(fed.lines[site], how)()
    at, start = fed.completed(), time.monotonic()
    fed.wait_rounds(at + 2)
    assert time.monotonic() - start > 4, "a whole deadline passed without it"
    without = fed.completed()
    assert max(taken(fed, site)) <= at + 1
    fed.lines[site].mend()
    fed.until(lambda: max(taken(fed, site)) > without, 60, f"{site} takes part again")
    settled(fed)


def test_below_the_quorum_the_run_waits_and_goes_on_when_the_line_is_back(federation):
    """The control of the test above: without a quorum no round is completed."""
    fed = federation(rounds=300, study=SHORT)
    fed.start()
    fed.wait_rounds(1)
    away = fed.sites[:2]
    for site in away:
        fed.lines[site].cut()
    time.sleep(1)
    at = fed.completed()
    time.sleep(AWAY_S)
    assert fed.completed() <= at + 1
    for site in away:
        fed.lines[site].mend()
    fed.wait_rounds(at + 3)
    settled(fed)


def test_a_line_of_four_megabits_takes_part_in_every_round(federation):
    size = 300_000
    fed = federation(sites=3, rounds=2, shapes={"w": (size,)})
    line = fed.lines[fed.sites[0]]
    line.rate = 500_000
    start = time.monotonic()
    fed.start()
    ended(fed)
    seconds = time.monotonic() - start
    require_whole(fed)
    assert {len(names) for names in fed.survivors().values()} == {3}
    assert line.up > 2 * 3 * size
    # The line is as thin as it says: what came down took its time.
    assert seconds > line.down / line.rate


def test_a_transfer_that_breaks_in_the_middle_goes_on_where_it_was(federation):
    size, part = 16_000_000, 5_300_000
    upload = 3 * size
    fed = federation(sites=3, rounds=1, shapes={"w": (size,)}, options={"cheap": True})
    line = fed.lines[fed.sites[0]]
    fed.start()
    fed.until(lambda: line.up > 200_000, 60, "an upload")
    line.break_after(upload // 2)
    ended(fed)
    require_whole(fed)
    assert line.cuts == 1
    assert {len(names) for names in fed.survivors().values()} == {3}
    # Parts that were under way are sent again, two at a time and some of them twice; sent from the
    # beginning it would be half of all.
    assert line.up < upload + 4 * part + 1_000_000 < 1.5 * upload
