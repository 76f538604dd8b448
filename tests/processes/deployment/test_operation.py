"""What people do to a run: stop it, go on with it, revoke, stop a hospital, come late."""

from __future__ import annotations

import pytest
from federation import COORDINATOR, ended, require_sound, require_whole, settled

from common.cli import main

SHORT = {"deadlines": {"handshake_s": 6, "train_s": 6, "upload_s": 6, "agree_s": 6, "unmask_s": 6}}


def part_of(fed, site):
    return [number for number, names in fed.survivors().items() if site in names]


def test_a_coordinator_that_was_stopped_goes_on_from_its_disk(federation):
    fed = federation(rounds=6)
    fed.start()
    fed.wait_rounds(2)
    assert fed.stop(COORDINATOR) == 0, fed.output(COORDINATOR)
    told = fed.output(COORDINATOR)
    assert "stopped; everything is kept." in told
    assert "wardround server resume" in told
    done = fed.completed()
    assert done < 6
    fed.start(COORDINATOR)
    ended(fed)
    require_whole(fed)
    assert len(fed.events("run.resumed")) == 1
    assert {len(names) for names in fed.survivors().values()} == {4}


def test_a_revoked_hospital_is_gone_within_one_round(federation):
    fed = federation(rounds=300, study=SHORT)
    fed.start()
    site = "south"
    fed.wait_rounds(2)
    fed.revoke(site)
    fed.until(lambda: fed.events("site.revoked"), 30, "the coordinator saw it")
    at = fed.completed()
    fed.wait_rounds(at + 3)
    assert 0 < max(part_of(fed, site)) <= at + 1
    assert max(fed.ledger(site).attempts) <= at + 1
    fed.until(lambda: fed.site_status(site)["link"]["code"] == "WR-8105", 30, "it is told")
    told = {entry["site"]: entry["state"] for entry in fed.status()["sites"]}
    assert told[site] == "revoked"
    settled(fed)


def test_a_hospital_that_stops_sends_nothing_and_comes_back_with_start(federation):
    fed = federation(rounds=300, study=SHORT)
    fed.start()
    site = "north"
    fed.wait_rounds(2)
    assert main(["client", "stop", "--config", str(fed.yaml(site))]) == 0
    at = fed.completed()
    fed.wait_rounds(at + 3)
    assert fed.alive(site)
    assert max(part_of(fed, site)) <= at + 1
    assert max(fed.ledger(site).attempts) <= at + 1
    last = fed.completed()
    assert main(["client", "start", "--config", str(fed.yaml(site))]) == 0
    fed.until(lambda: max(part_of(fed, site)) > last, 60, f"{site} takes part again")
    settled(fed)


def test_a_hospital_that_was_away_for_long_joins_the_next_round(federation):
    fed = federation(rounds=300, study=SHORT)
    fed.start()
    site = "east"
    fed.wait_rounds(2)
    fed.kill(site)
    fed.wait_rounds(fed.completed() + 4)
    fed.start(site)
    fed.until(lambda: site in fed.events("site.online")[-1]["site"], 30, "it is heard")
    back = fed.completed()
    fed.until(lambda: max(part_of(fed, site)) > back, 60, f"{site} takes part again")
    # Not in the round that was open when it came; in the one after that.
    assert max(part_of(fed, site)) <= back + 3
    settled(fed)


def test_a_hospital_that_was_away_at_the_end_is_given_the_model(federation):
    fed = federation(rounds=3, study=SHORT)
    fed.linger_h = 0.0005
    fed.start()
    site = "west"
    fed.wait_rounds(2)
    fed.kill(site)
    assert fed.finish()["rounds_completed"] == 3
    assert not fed.has_model(site)
    # Days later the coordinator is started again, and so is the hospital.
    fed.start(COORDINATOR, site)
    ended(fed)
    require_whole(fed)


@pytest.mark.timeout(300)
def test_real_hospitals_with_torch_are_killed_and_finish(tmp_path, zygote):
    """The same with the product alone: `client run`, its child with torch, real records."""
    from real import real_federation

    with real_federation(tmp_path, zygote) as fed:
        fed.start()
        fed.wait_rounds(1, 180)
        site = fed.sites[0]
        fed.kill(site)
        fed.kill(COORDINATOR)
        fed.start(site, COORDINATOR)
        ended(fed, seconds=180)
        told = fed.conclusion()
        assert told["rounds_completed"] == fed.bundle.study.training.rounds
        for name in fed.sites:
            assert fed.ledger(name).double_spent == 0
            assert fed.study_folder(name).model.is_dir()
        require_sound(fed)
