"""Records the disturbed transcript: `PYTHONPATH=. python tests/vectors/make_disturbed.py`.

What the undisturbed one lacks: six hospitals count statistics first (turn 0) and train with
FedAdam. One of them signs a wrong key confirmation; the dispute reveals two hospitals' ephemeral
keys, convicts it, and a second epoch begins without it. In round 3 two uploads are lost: the
round is burned, and the next one starts with the certificate and loses another upload.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "schedules"))
sys.path.insert(0, str(Path(__file__).parent))

import world as schedules
from make_transcript import LAYOUT, MAX_BYTES, floats, inputs_of, squeeze

from client.handshake import Handshake
from common.protocol import transcript, wire
from common.statistics import StatisticsLayout
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import state_digest

FILE = Path(__file__).parent / "disturbed.json"
BITS, SITES = 24, 6
CHEAT, VICTIM = "site-04", "site-02"
LOST = {3: ("site-01", "site-02"), 4: ("site-06",)}
# The largest is of the hospital that never takes part: it counts in the range all the same.
WEIGHTS = (0.4, 0.25, 0.375, 1.0, 0.45, 0.325)
CONSTANTS = {"learning_rate": 0.02, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}
FEATURES, NOISE = 3, 0.5
PATIENT = 2**16
# Sums of u and of its square, and patients present: an ordinary feature, one whose deviation is
# below the noise, and one with too few patients to be seen through it.
COUNTED = ((2.0, 2.0, 10.0), (-4.5, 2.05, 10.0), (0.3, 0.1, 1.0))


def statistics_of(site: str) -> np.ndarray:
    """A hospital's statistic words, a little different at each."""
    shift = 64 * int(site[-2:])
    first, second, present = (np.array(part) * PATIENT for part in zip(*COUNTED, strict=True))
    words = np.concatenate([first + shift, second - shift, present / 4 + shift])
    return np.rint(words).astype(np.int64)


class Recorder:
    """The federation, and what its messages alone do not show."""

    def __init__(self) -> None:
        self.inputs: dict[str, dict[str, object]] = {}
        self.handshakes: dict[int, dict[str, Handshake]] = {}
        recorder = self

        class Worker(schedules.TracerWorker):
            def work(self, request):
                return recorder.work(self.site, request, super().work(request))

        with patch.object(schedules, "TracerWorker", Worker):
            self.world = schedules.World(
                SITES, seed="transcript-disturbed", rounds=2, bits=BITS, c=1, features=FEATURES
            )
            self.world.terms = self.terms()
            self.world.network = self.lose
            self.run()

    def work(self, site: str, request, worked):
        update, metrics = inputs_of(site, request.round, self.world.terms.metric_words)
        statistics = statistics_of(site)
        self.inputs.setdefault(str(request.round), {})[site] = {
            "update": update.tobytes().hex() if request.trains else None,
            "metrics": metrics.tolist() if request.measures else None,
            "statistics": statistics.tolist() if request.counts else None,
            "ledger": [worked.ledger.counter, worked.ledger.head.hex()],
        }
        return dataclasses.replace(
            worked,
            update=update.copy() if request.trains else None,
            metrics=metrics if request.measures else None,
            statistics=statistics if request.counts else None,
        )

    def terms(self):
        made = self.world.terms
        optimizer = ServerOptimizer(OptimizerSettings(name="fedadam", **CONSTANTS))
        counted = StatisticsLayout(FEATURES, NOISE)
        initial = LAYOUT.unflatten(floats("initial", LAYOUT.size))
        return dataclasses.replace(
            made, layout=LAYOUT, initial={**optimizer.initial(initial), **counted.initial()},
            optimizer=optimizer, exponents=(12, 10), statistics=counted,
            weights=dict(zip(made.parties, WEIGHTS, strict=True)),
        )  # fmt: skip

    def lose(self, sender: str, recipient: str, payload: bytes):
        driver = self.world.coordinator.driver
        if driver is None:  # the hospitals' first words
            return [(sender, recipient, payload)]
        seen = driver.machine.record
        if CHEAT in (sender, recipient) and seen.convicted:
            return []
        uploads = sender != "coordinator" and (
            wire.unpack_from_site(payload, MAX_BYTES)[0] is wire.Upload
        )
        lost = uploads and sender in LOST.get(seen.round, ())
        return [] if lost else [(sender, recipient, payload)]

    def run(self) -> None:
        finish, recorder = Handshake.finish, self

        def tapped_finish(handshake, message):
            site, epoch = handshake.run_key.site, handshake.epoch
            recorder.handshakes.setdefault(epoch, {})[site] = handshake
            confirm = finish(handshake, message)
            if site == CHEAT:
                tags = {**confirm.tags, VICTIM: bytes(16)}
                confirm = dataclasses.replace(confirm, tags=tags)
            return confirm

        with patch.object(Handshake, "finish", tapped_finish):
            self.world.start()
            self.world.run()


def epochs(recorder: Recorder) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Of every epoch: its secrets, and what follows from them."""
    secrets, derived = [], []
    for shaken in recorder.handshakes.values():
        revealed = {s: h._ephemeral.reveal() for s, h in shaken.items()}
        secrets.append({
            "x25519": {s: x.hex() for s, (x, _) in revealed.items()},
            "mlkem_seed": {s: seed.hex() for s, (_, seed) in revealed.items()},
            "mlkem_shared": {
                f"{s} {v}": shared.hex() for s, h in shaken.items() for v, shared in h._shared.items()
            },
        })  # fmt: skip
        derived.append({
            "rt": next(iter(shaken.values())).transcript.hex(),
            "pair_keys": {
                f"{s} {v}": k.hex() for s, h in shaken.items() for v, k in h.keys.items() if s < v
            },
        })  # fmt: skip
    return secrets, derived


def rounds(world) -> list[dict[str, object]]:
    """The derived values of every round that gave an aggregate, as the packages compute them."""
    links = {}
    uploads: dict[str, dict[str, list[str]]] = {}
    for sender, recipient, payload in world.wire:
        if sender == "coordinator" and recipient == world.sites[0]:
            message = wire.unpack_from_coordinator(payload, MAX_BYTES)
            if isinstance(message, wire.RoundStart | wire.Finished) and message.link is not None:
                links[message.link.header.round] = message.link
        elif sender != "coordinator":
            kind, message = wire.unpack_from_site(payload, MAX_BYTES)
            if kind is wire.Upload:
                receipt = wire.unpack_body(wire.Receipt, message.receipt)
                starts = [bytes(plane[:16]).hex() for plane in message.planes]
                found = uploads.setdefault(receipt.participants.hex(), {})
                found[sender] = [receipt.root.hex(), *starts]
    written = []
    for link, chain in zip(links.values(), world.chains, strict=True):
        hashed = transcript.header_hash(link.header)
        uh1 = transcript.participants_hash(hashed, link.heads)
        uh2, following = transcript.link_hashes(link)
        written.append({
            "hh": hashed.hex(), "uh1": uh1.hex(), "uh2": uh2.hex(), "commit": following.hex(),
            "uploads": uploads[uh1.hex()],
            "aggregate": [bytes(words).hex() for words in link.sums],
            "exponents": list(chain.exponents), "state": chain.state_digest.hex(),
        })  # fmt: skip
    return written


def record() -> dict[str, object]:
    """The federation, played and written down."""
    recorder = Recorder()
    world, terms = recorder.world, recorder.world.terms
    secrets, derived = epochs(recorder)
    return {
        "bits": BITS,
        "terms": {
            "study": terms.study.hex(),
            "roster": {site: public.hex() for site, public in terms.roster.items()},
            "quorum": terms.quorum,
            "weights": {site: weight.hex() for site, weight in terms.weights.items()},
            "layout": [[spec.name, list(spec.shape)] for spec in terms.layout.specs],
            "metric_words": terms.metric_words,
            "features": FEATURES,
            "statistics_noise": NOISE.hex(),
            "initial": {
                name: [list(value.shape), np.ascontiguousarray(value, "<f4").tobytes().hex()]
                for name, value in terms.initial.items()
            },
            "exponents": list(terms.exponents),
            **CONSTANTS,
            "turns": terms.turns,
        },
        "secrets": {"epochs": secrets},
        "inputs": recorder.inputs,
        "derived": {
            "epochs": derived, "rounds": rounds(world),
            "final": state_digest(world.final.state).hex(),
        },
        "messages": [[a, b, payload.hex()] for a, b, payload in world.wire],
    }  # fmt: skip


if __name__ == "__main__":
    text = json.dumps(
        {"format": "wardround-transcript/1", "runs": [squeeze(record())]}, indent=0, sort_keys=True
    )
    FILE.write_text(text + "\n")
