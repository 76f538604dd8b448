"""Records the frozen transcript: `PYTHONPATH=. python tests/vectors/make_transcript.py`.

One seeded federation per ring: four hospitals, one handshake, two training rounds (in the second
a hospital's upload is lost) and the final evaluation. Everything is a function of the seeds but
the ML-KEM encapsulations, whose randomness is the library's own: they are recorded instead.
Bytes that messages quote from each other (statements, ciphertexts, shares) are written once,
under `pieces`, and quoted as `{index}`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "schedules"))

import world as schedules

from client.handshake import Handshake
from client.round import upload
from client.round.effects import Worked
from common.crypto.digest import decode
from common.protocol import transcript, wire
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec, state_digest

FILE = Path(__file__).parent / "transcript.json"
LOST, LOST_ROUND = "site-03", 2
LAYOUT = Layout((TensorSpec("layer.bias", (3,)), TensorSpec("layer.weight", (2, 4))))
WEIGHTS = (1.0, 0.5, 0.75, 0.3)
MAX_BYTES = 1 << 24


def floats(seed: str, count: int) -> np.ndarray:
    """Float32 values of many sizes: ties of the grid, halves, tiny ones, and one that saturates."""
    raw = np.frombuffer(hashlib.shake_256(seed.encode()).digest(2 * count), "<i2")
    values = (raw / 2.0**13).astype(np.float32)
    values[:3] = [1.5 * 2.0**-12, -2.5 * 2.0**-12, 3e5]
    return values


def inputs_of(site: str, number: int, metric_words: int) -> tuple[np.ndarray, np.ndarray]:
    words = hashlib.shake_256(f"metrics {site} {number}".encode()).digest(8 * metric_words)
    metrics = np.frombuffer(words, "<i8") >> 20  # signed, and far from the ring's edge
    return floats(f"update {site} {number}", LAYOUT.size), metrics.copy()


class Recorder:
    """Taps on one federation: what the messages alone do not show."""

    def __init__(self, bits: int) -> None:
        self.inputs: dict[str, dict[str, object]] = {}
        self.handshakes: dict[str, Handshake] = {}
        self.secrets: dict[tuple[int, str], bytes] = {}
        self.planes: dict[tuple[int, str], list[bytes]] = {}
        recorder = self

        class Worker(schedules.TracerWorker):
            def work(self, request):
                worked = super().work(request)
                update, metrics = inputs_of(self.site, request.round, self.terms.metric_words)
                given = recorder.inputs.setdefault(str(request.round), {})
                given[self.site] = {
                    "update": update.tobytes().hex() if request.trains else None,
                    "metrics": metrics.tolist() if request.measures else None,
                    "ledger": [worked.ledger.counter, worked.ledger.head.hex()],
                }
                return Worked(
                    update.copy() if request.trains else None,
                    metrics if request.measures else None, worked.ledger,
                )  # fmt: skip

        with patch.object(schedules, "TracerWorker", Worker):
            self.world = schedules.World(4, seed=f"transcript-{bits}", rounds=2, bits=bits)
            self.world.terms = self.terms(bits)
            self.world.network = self.lose
            self.run()

    def terms(self, bits: int):
        made = self.world.terms
        optimizer = ServerOptimizer(
            OptimizerSettings(name="fedavgm", learning_rate=0.7, momentum=0.9)
        )
        initial = LAYOUT.unflatten(floats("initial", LAYOUT.size))
        return dataclasses.replace(
            made, layout=LAYOUT, initial=optimizer.initial(initial), optimizer=optimizer,
            exponents=(12, 10), weights=dict(zip(made.parties, WEIGHTS, strict=True)),
        )  # fmt: skip

    def lose(self, sender: str, recipient: str, payload: bytes):
        lost = sender == LOST and (LOST_ROUND, LOST) in self.secrets
        if lost and wire.unpack_from_site(payload, MAX_BYTES)[0] is wire.Upload:
            machine = self.world.coordinator.driver.machine
            return [] if machine.record.round == LOST_ROUND else [(sender, recipient, payload)]
        return [(sender, recipient, payload)]

    def run(self) -> None:
        finish, mask = Handshake.finish, upload._mask
        recorder = self

        def tapped_finish(handshake, message):
            recorder.handshakes[handshake._site] = handshake
            return finish(handshake, message)

        def tapped_mask(state, *arguments):
            at = (state.record.round, state.site)
            recorder.secrets[at] = state.secrets.self_secret
            return mask(state, *arguments)

        with (
            patch.object(Handshake, "finish", tapped_finish),
            patch.object(upload, "_mask", tapped_mask),
        ):
            self.world.start()
            self.world.run()


def record(bits: int) -> dict[str, object]:
    """One federation, played and written down."""
    recorder = Recorder(bits)
    world, terms = recorder.world, recorder.world.terms
    first = recorder.handshakes[terms.parties[0]]
    return {
        "bits": bits,
        "terms": {
            "study": terms.study.hex(),
            "roster": {site: public.hex() for site, public in terms.roster.items()},
            "quorum": terms.quorum,
            "weights": {site: weight.hex() for site, weight in terms.weights.items()},
            "layout": [[spec.name, list(spec.shape)] for spec in terms.layout.specs],
            "metric_words": terms.metric_words,
            "initial": {
                name: [list(value.shape), np.ascontiguousarray(value, "<f4").tobytes().hex()]
                for name, value in terms.initial.items()
            },
            "exponents": list(terms.exponents),
            "learning_rate": 0.7,
            "momentum": 0.9,
            "turns": terms.turns,
        },
        "secrets": {
            "x25519": {s: h._ephemeral.reveal()[0].hex() for s, h in recorder.handshakes.items()},
            "mlkem_seed": {s: h._ephemeral.reveal()[1].hex() for s, h in recorder.handshakes.items()},
            "mlkem_shared": {
                f"{s} {v}": shared.hex()
                for s, h in recorder.handshakes.items() for v, shared in h._shared.items()
            },
            "self": {f"{r} {s}": secret.hex() for (r, s), secret in recorder.secrets.items()},
        },
        "inputs": recorder.inputs,
        "derived": {
            "rt": first.transcript.hex(),
            "pair_keys": {
                f"{s} {v}": key.hex()
                for s, h in recorder.handshakes.items() for v, key in h.keys.items() if s < v
            },
            "rounds": rounds(world),
            "final": state_digest(world.final.state).hex(),
        },
        "messages": [[a, b, payload.hex()] for a, b, payload in world.wire],
    }  # fmt: skip


def rounds(world) -> list[dict[str, object]]:
    """The derived values of every round, as the packages compute them."""
    links = [
        m.link
        for sender, recipient, payload in world.wire
        if sender == "coordinator" and recipient == world.sites[0]
        for m in [wire.unpack_from_coordinator(payload, MAX_BYTES)]
        if isinstance(m, wire.RoundStart | wire.Finished) and m.link is not None
    ]
    uploads: dict[tuple[str, str], list[str]] = {}
    for sender, _, payload in world.wire:
        if sender != "coordinator":
            kind, message = wire.unpack_from_site(payload, MAX_BYTES)
            if kind is wire.Upload:
                receipt = wire.unpack_body(wire.Receipt, message.receipt)
                starts = [bytes(plane[:16]).hex() for plane in message.planes]
                uploads[receipt.participants.hex(), sender] = [receipt.root.hex(), *starts]
    written = []
    for link, chain in zip(links, world.chains, strict=True):
        hashed = transcript.header_hash(link.header)
        uh1 = transcript.participants_hash(hashed, link.heads)
        uh2, following = transcript.link_hashes(link)
        written.append({
            "hh": hashed.hex(), "uh1": uh1.hex(), "uh2": uh2.hex(), "commit": following.hex(),
            "uploads": {site: found for (at, site), found in sorted(uploads.items()) if at == uh1.hex()},
            "aggregate": [bytes(words).hex() for words in link.sums],
            "exponents": list(chain.exponents), "state": chain.state_digest.hex(),
        })  # fmt: skip
    return written


def squeeze(run: dict[str, object]) -> dict[str, object]:
    """Write what several messages quote once, and refer to it; long pieces quote shorter ones."""
    texts = [text for _, _, text in run["messages"]]
    quoted = list(texts)
    for text in texts:
        value = decode(bytes.fromhex(text), max_bytes=MAX_BYTES)
        quoted += [part.hex() for part in leaves(value) if len(part) >= 48]
    pieces = sorted({part for part in quoted if quoted.count(part) > 1}, key=lambda p: (-len(p), p))
    whole = list(pieces)
    for index, part in enumerate(whole):
        texts = [text.replace(part, f"{{{index}}}") for text in texts]
        pieces[:index] = [longer.replace(part, f"{{{index}}}") for longer in pieces[:index]]
    messages = [[a, b, text] for (a, b, _), text in zip(run["messages"], texts, strict=True)]
    return {**run, "pieces": pieces, "messages": messages}


def leaves(value: object):
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(tuple(value.values()))


if __name__ == "__main__":
    runs = [squeeze(record(bits)) for bits in (24, 32)]
    text = json.dumps({"format": "wardround-transcript/1", "runs": runs}, indent=0, sort_keys=True)
    FILE.write_text(text + "\n")
