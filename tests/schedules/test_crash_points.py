"""Every single point at which a process can die, one after the other, each in its own run."""

import pytest
from schedule import Schedule

SETTINGS = {"seed": "crash-points", "rounds": 2, "spare": 20}
PARTIES = ["coordinator", "site-01", "site-02", "site-03", "site-04"]


def points() -> dict[str, int]:
    world = Schedule(4, **SETTINGS)
    world.start()
    assert world.play()
    return dict(world.points)


@pytest.mark.parametrize("party", PARTIES)
@pytest.mark.parametrize("seconds", [2.0, 33.0])
def test_a_crash_at_any_point_loses_no_round(party, seconds):
    count = points()[party]
    assert count > 50
    for at in range(1, count + 1):
        world = Schedule(4, **SETTINGS)
        world.at_point[party, at] = world.crash(seconds)
        world.start()
        assert world.play(), (party, at)
        assert world.crashes == [party], (party, at)
        world.check()


@pytest.mark.parametrize("party", PARTIES)
def test_a_full_disk_at_any_point_loses_no_round(party):
    for at in range(1, points()[party] + 1, 2):
        world = Schedule(4, **SETTINGS)
        world.at_point[party, at] = world.full(15.0)
        world.start()
        assert world.play(), (party, at)
        world.check()
