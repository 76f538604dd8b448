"""A coordinator that signs and speaks properly, and lies: every attack over the transport.

`tests/adversary/test_rogue_coordinator.py` has the attacks and what must come of them. Here the
same rows go through envelope, Exchange, Grid and ClientApp; some of them through TLS sockets.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from rogue import RELEASES, VICTIM, finish, halt, record, to_site

from client.app import shell
from common.protocol.wire import pack
from common.world import SystemClock
from tests.adversary.test_rogue_coordinator import ROWS
from tests.security.coordinator import hospital_link, real_coordinator
from tests.security.wired import Wired


def trial(world, row):
    """The attack on the victim; then the genuine message, and the run to its end."""
    genuine, hostile = row.attack(world)
    before, asked = record(world, VICTIM), world.hospitals[VICTIM].questions
    reaction = to_site(world, VICTIM, hostile)
    assert world.hospitals[VICTIM].questions == asked + 1  # it did go over the transport
    assert reaction.codes == [row.code.label]
    assert not RELEASES & set(reaction.kinds)
    assert record(world, VICTIM) == before
    if genuine is not None:
        world.queue.appendleft(("coordinator", VICTIM, pack(genuine)))
        finish(world)
    assert world.watch.refusals == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_attack_is_refused_over_the_transport_too(row):
    trial(Wired(**row.settings), row)


def test_control_what_is_genuine_is_answered_over_the_same_transport():
    world = Wired()
    start = halt(world, "RoundStart", VICTIM)
    reaction = to_site(world, VICTIM, start)
    assert (reaction.codes, reaction.kinds) == ([], ["Ready"])
    assert finish(world) is None
    assert all(hospital.questions > 8 for hospital in world.hospitals.values())


# ---------------------------------------------------------------------------- over TLS sockets

SOME = ROWS[3::9]


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A real coordinator's listener, and the victim's real line to it."""
    place = SimpleNamespace(hospital=None)
    folder = tmp_path_factory.mktemp("rogue")
    stop = threading.Event()
    with real_coordinator(folder) as up:
        link = hospital_link(up, folder, VICTIM, shell(lambda: place.hospital))
        thread = threading.Thread(target=link.run, args=(stop,))
        thread.start()
        place.up = up.flower
        yield place
        stop.set()
        thread.join()


@pytest.mark.parametrize("row", SOME, ids=lambda row: row.name)
def test_the_attack_is_refused_over_real_sockets_too(line, row):
    up = line.up
    world = Wired(
        grid=up.grid(),
        registered=up.site_of,
        sites=[VICTIM],
        clock=SystemClock(),
        pause=up.wait,
        **row.settings,
    )
    line.hospital = world.hospitals[VICTIM]
    sent = up.traffic()[VICTIM].up if VICTIM in up.traffic() else 0
    trial(world, row)
    assert up.traffic()[VICTIM].up > sent


def test_the_rows_over_sockets_are_of_every_part_of_a_round():
    assert len(SOME) >= 10
    assert len({row.code.label[:5] for row in SOME}) >= 2
    assert len({row.code for row in SOME}) >= 9
