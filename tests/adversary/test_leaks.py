"""No piece of a hospital's plain update is on the wire or on any disk; without masks it is."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from schedule import Schedule
from world import TracerWorker

from client.round.effects import Worked
from common.crypto import mask
from common.secagg.masking import pack
from common.secagg.quantise import quantise_layout

SIZE = 600
WINDOW = 16


class RandomWorker(TracerWorker):
    """A hospital whose update and metrics are random, so that every window of them is unique."""

    plain: ClassVar[dict[str, list[bytes]]] = {}

    def work(self, request):
        worked = super().work(request)
        draw = np.random.default_rng([request.round, self.terms.parties.index(self.site)])
        update = metrics = None
        spoken = RandomWorker.plain.setdefault(self.site, [])
        if worked.update is not None:
            update = (draw.normal(size=worked.update.size) * 100).astype(np.float32)
            words = quantise_layout(
                update,
                exponents=(12,),
                sizes=(update.size,),
                bits=self.terms.ring_bits,
                parties=len(self.terms.roster),
            )
            spoken += [update.tobytes(), words.tobytes()]
            spoken += [
                np.asarray(p).tobytes()
                for p in pack(words.copy().view(np.uint32), self.terms.ring_bits)
            ]
        if worked.metrics is not None:
            metrics = draw.integers(-(2**40), 2**40, worked.metrics.size)
            spoken.append(metrics.tobytes())
        return Worked(update, metrics, worked.ledger)


def windows(plain: list[bytes]) -> set[bytes]:
    """Sixteen bytes from every eighth place: any 24 bytes in a row would show one."""
    found = {part[i : i + WINDOW] for part in plain for i in range(0, len(part) - WINDOW + 1, 8)}
    return {w for w in found if len(set(w)) > 4}


def leaks(world: Schedule, secret: set[bytes]) -> int:
    blobs = [payload for _, _, payload in world.wire]
    for party in [world.coordinator, *world.parties.values()]:
        blobs += [*party.disk.blobs.values(), party.disk.record or b""]
    blobs += [event.encode() for event in world.events]
    return sum(b[i : i + WINDOW] in secret for b in blobs for i in range(len(b) - WINDOW + 1))


def spoken(monkeypatch, bits: int, n: int = 4) -> tuple[Schedule, dict[str, set[bytes]]]:
    RandomWorker.plain = {}
    monkeypatch.setattr("world.TracerWorker", RandomWorker)
    monkeypatch.setattr("world.make_terms", wide(bits))
    world = Schedule(n, seed="leaks", rounds=2, bits=bits)
    world.start()
    while world.final is None:
        world.step()
        if world.coordinator.driver.machine.phase == "upload" and len(world.rounds) == 1:
            world.parties["site-04"].kill()  # its upload stays on its disk, and is opened by nobody
    return world, {site: windows(plain) for site, plain in RandomWorker.plain.items()}


def wide(bits: int):
    from world import make_terms as narrow

    return lambda sites, keys, **settings: narrow(
        sites, keys, **{**settings, "extra": SIZE, "bits": bits}
    )


@pytest.mark.parametrize("bits", [24, 32])
def test_no_window_of_a_plain_update_is_on_the_wire_or_on_a_disk(monkeypatch, bits):
    world, secret = spoken(monkeypatch, bits)
    assert len(world.rounds) == 3
    for site, pieces in secret.items():
        assert len(pieces) > 500
        assert leaks(world, pieces) == 0, site


@pytest.mark.parametrize("bits", [24, 32])
def test_without_masks_it_would_be_found(monkeypatch, bits):
    monkeypatch.setattr(mask.Streams, "add", lambda self, target: None)
    world, secret = spoken(monkeypatch, bits)
    for site, pieces in secret.items():
        assert leaks(world, pieces) > 100, site
