"""Leak canaries: what a hospital must keep is nowhere else, and the search would find it.

A whole federation runs with marked notes, patients and labels. Every byte that crosses the
network, every file outside the hospitals' own folders, and everything printed is searched for
the marks in several encodings, and for windows of every hospital's update.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from client.training import LocalTrainer
from common.crypto.mask import Streams
from common.secagg.quantise import Quantiser
from server.network import InProcessNetwork
from server.simulate import _Witnessed

TEXT = "canarytext0f8b1d6a93c24e57b1a6d0"
PATIENT = "canarypatient5c2e9a7b41d08f63e9b"
LABEL = "canarylabel7d1f4b8a2c6e905d3b7f1"
assert {len(TEXT), len(PATIENT), len(LABEL)} == {32}
WINDOW = 16


def encodings(secret: str) -> set[bytes]:
    """How a secret may look: plain, in hex, in UTF-16, in base64 at every alignment."""
    raw = secret.encode()
    found = {raw, raw.upper(), raw.hex().encode(), raw.hex().upper().encode()}
    found |= {secret.encode("utf-16-le"), secret.encode("utf-16-be")}
    for shift in range(3):
        coded = base64.b64encode(bytes(shift) + raw)
        found.add(coded[4:-4])
        found.add(base64.urlsafe_b64encode(bytes(shift) + raw)[4:-4])
    return found


def windows(data: bytes) -> set[bytes]:
    """Sixteen-byte pieces that say something: not those of zeros and repeats."""
    pieces = (data[at : at + WINDOW] for at in range(0, len(data) - WINDOW + 1, WINDOW))
    return {piece for piece in pieces if len(set(piece)) > WINDOW // 2}


@dataclass
class Seen:
    """What a run let out, and what it must not have let out."""

    wire: list[bytes] = field(default_factory=list)
    updates: list[bytes] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    printed: bytes = b""
    saw: dict[str, int] = field(default_factory=dict)

    def hits(self, needles: set[bytes], *, where: str) -> int:
        """How many needles are in the wire, the files or what was printed."""
        if where == "wire":
            places = self.wire
        elif where == "files":
            places = list(self.files.values())
        elif where == "logs":
            kinds = ("/audit/", "wardround.log.jsonl")
            places = [d for name, d in self.files.items() if any(kind in name for kind in kinds)]
        else:
            places = [self.printed]
        joined = b"\n".join(places)
        return sum(needle in joined for needle in needles)

    def update_windows(self) -> set[bytes]:
        """Windows of every update as floats, and of its quantised words as they are packed."""
        found: set[bytes] = set()
        for update in self.updates:
            found |= windows(update)
        for words in self.words:
            found |= windows(words)
        return found


def mark(path: Path) -> None:
    """Plant the canaries in the first note of every hospital."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    done = set()
    for row in rows:
        if row["hospital"] not in done:
            done.add(row["hospital"])
            row["text"] = f"fever and {TEXT} cough"
            row["patient"] = f"{row['hospital']}-{PATIENT}"
        if row["label"] == "asthma":
            row["label"] = LABEL
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run(make_study, wardround, tmp_path, monkeypatch, capfd):
    """Runs a marked federation and returns what could be seen of it."""

    def go(*, tuning="head", bits=24, verb=()):
        seen = Seen()
        _listen(monkeypatch, seen)
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        study = make_study(
            {
                "task": {"labels": ["pneumonia", LABEL, "heart failure"]},
                "model": {"tuning": tuning},
                "training": {"rounds": 2},
                "aggregation": {"ring_bits": bits},
                "simulation": {"faults": [{"round": 2, "site": "west", "fault": "crash"}]},
            }
        )
        mark(tmp_path / "notes.csv")
        out = tmp_path / "out"
        status, told, problems = wardround("simulate", study, "--out", out, "--json", *verb)
        assert status in {0, 1}, problems
        status, more, _ = wardround("privacy", out)
        seen.printed = (told + problems + more + wardround("audit", "verify", out)[1]).encode()
        seen.saw = json.loads(told)["coordinator_saw"]
        own = out / "state" / "sites"
        for path in [*out.rglob("*"), *scratch.rglob("*")]:
            if path.is_file() and own not in path.parents:
                seen.files[path.name if path.is_relative_to(scratch) else str(path)] = (
                    path.read_bytes()
                )
        return seen

    return go


def _listen(monkeypatch, seen):
    send, post = InProcessNetwork.send, InProcessNetwork.post
    train, block = LocalTrainer.train, Quantiser.block

    def sent(self, recipient, payload):
        seen.wire.append(bytes(payload))
        send(self, recipient, payload)

    def posted(self, site, payload):
        seen.wire.append(bytes(payload))
        post(self, site, payload)

    def trained(self, state, round_number):
        update = train(self, state, round_number)
        if round_number:  # what trains alone, for the comparison, is not uploaded
            seen.updates.append(update.tobytes())
        return update

    def quantised(self, start, stop, words):
        block(self, start, stop, words)
        plain = words.view("<u2")[::2].tobytes()
        seen.words += [words.tobytes(), plain]

    monkeypatch.setattr(InProcessNetwork, "send", sent)
    monkeypatch.setattr(InProcessNetwork, "post", posted)
    monkeypatch.setattr(LocalTrainer, "train", trained)
    monkeypatch.setattr(Quantiser, "block", quantised)


@pytest.mark.parametrize(("tuning", "bits"), [("head", 24), ("bitfit", 32)])
def test_nothing_of_a_hospital_is_on_the_wire_in_logs_or_on_disk_elsewhere(run, tuning, bits):
    seen = run(tuning=tuning, bits=bits)
    assert seen.saw["plain_updates"] == 0
    assert len(seen.wire) > 100
    assert len(seen.files) > 15
    assert len(seen.updates) >= 8
    for secret in (TEXT, PATIENT):
        for where in ("wire", "files", "printed"):
            assert seen.hits(encodings(secret), where=where) == 0, (secret, where)
    # The study itself names its labels, in its own file and in the model: nowhere else.
    assert seen.hits(encodings(LABEL), where="wire") == 0
    assert seen.hits(encodings(LABEL), where="logs") == 0
    needles = seen.update_windows()
    assert len(needles) > 50
    for where in ("wire", "files", "printed"):
        assert seen.hits(needles, where=where) == 0, where


def test_without_masks_the_same_search_finds_the_updates(run, monkeypatch):
    monkeypatch.setattr(Streams, "add", lambda _self, _target: None)
    seen = run()
    assert seen.hits(seen.update_windows(), where="wire") > 20
    assert seen.saw["masked_updates"] == 0
    assert seen.saw["plain_updates"] == 11, "every bare upload is counted as one"


def test_a_text_that_is_logged_is_found(run, monkeypatch):
    record = _Witnessed.record

    def careless(self, event, fields):
        record(self, event, fields)
        self._log.info("note.read", site=TEXT)

    monkeypatch.setattr(_Witnessed, "record", careless)
    seen = run()
    assert seen.hits(encodings(TEXT), where="logs") == 1
    assert seen.hits(encodings(TEXT), where="files") == 1
    assert seen.hits(encodings(TEXT), where="wire") == 0


@pytest.mark.parametrize("place", ["wire", "printed"])
def test_the_search_finds_every_encoding(place):
    for shift in range(3):
        for form in (
            TEXT.encode(),
            TEXT.encode().hex().encode(),
            TEXT.encode("utf-16-le"),
            base64.b64encode(b"x" * shift + TEXT.encode() + b"yz"),
        ):
            seen = Seen(wire=[b"before " + form + b" after"], printed=b"." + form + b".")
            assert seen.hits(encodings(TEXT), where=place) >= 1


def test_windows_of_an_update_are_found_in_a_plain_message():
    update = np.random.default_rng(0).normal(size=64).astype(np.float32).tobytes()
    seen = Seen(wire=[b"header" + update + b"trailer"], updates=[update])
    assert seen.hits(seen.update_windows(), where="wire") == len(update) // WINDOW
    with contextlib.suppress(ValueError):
        assert Seen(wire=[bytes(512)]).hits(windows(update), where="wire") == 0
