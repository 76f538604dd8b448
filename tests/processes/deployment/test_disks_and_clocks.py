"""A disk that is full, a clock that is days off: told by a code, and over when it is mended."""

from __future__ import annotations

import pytest
from federation import COORDINATOR, ended, require_whole, settled

SHORT = {"deadlines": {"handshake_s": 6, "train_s": 6, "upload_s": 6, "agree_s": 6, "unmask_s": 6}}
TWO_DAYS = 48 * 3600


def takes_part(fed, site, after):
    """Whether a hospital was summed in a round after `after`."""
    return lambda: any(site in names for n, names in fed.survivors().items() if n > after)


def test_a_full_disk_of_the_coordinator_is_told_and_the_run_goes_on_after_it(federation):
    fed = federation(rounds=6, disks={COORDINATOR: 24})
    fed.start()
    fed.wait_rounds(2)
    fed.disks[COORDINATOR].fill()
    assert fed.ended(COORDINATOR, 60) == 7, fed.output(COORDINATOR)
    told = fed.output(COORDINATOR)
    assert "what to do" in told
    assert "Traceback" not in told
    assert fed.completed() < 6
    fed.disks[COORDINATOR].empty()
    fed.start(COORDINATOR)
    ended(fed)
    require_whole(fed)
    assert {len(names) for names in fed.survivors().values()} == {4}


def test_a_full_disk_of_a_hospital_costs_it_rounds_and_nothing_else(federation):
    site = "north"
    fed = federation(rounds=300, study=SHORT, disks={site: 24})
    fed.start()
    fed.wait_rounds(2)
    fed.disks[site].fill()
    at = fed.completed()
    fed.wait_rounds(at + 3)
    assert fed.alive(site), fed.output(site)
    assert not takes_part(fed, site, at + 1)()
    fed.disks[site].empty()
    fed.until(takes_part(fed, site, fed.completed()), 60, f"{site} takes part again")
    settled(fed)


@pytest.mark.parametrize("offset", [TWO_DAYS, -TWO_DAYS])
def test_a_clock_two_days_off_is_refused_by_name_and_mended_without_a_restart(federation, offset):
    site = "west"
    fed = federation(rounds=300, study=SHORT)
    clock = fed.root / site / "clock.txt"
    clock.write_text(str(offset))
    fed.start()
    fed.wait_rounds(2)
    fed.until(lambda: fed.site_status(site)["link"]["code"] == "WR-8104", 30, "the refusal")
    link = fed.site_status(site)["link"]
    assert "48 h" in link["waiting_because"]
    assert ("ahead" if offset > 0 else "behind") in link["waiting_because"]
    assert abs(link["clock_offset_s"] - offset) < 60
    assert not takes_part(fed, site, 0)()
    clock.write_text("0")
    fed.until(takes_part(fed, site, 0), 90, f"{site} takes part")
    settled(fed)
