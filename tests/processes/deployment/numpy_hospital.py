"""A hospital's daemon whose trainer is numpy and whose noise is seeded: for tests alone.

It is composed of the product's own parts (`HospitalHost`, `FleetLink`, `Operation`); only the
child process with torch is replaced, and the wall clock that signs and compares may be wrong. No
setting of the product leads here.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.metrics import words_from_counts
from common.tensors import Layout, save_tensors

OPTIONS, MARK = "runner.json", "training"
STEP, NOISE = np.float32(0.25), np.float32(0.02)


def _stream(seed: int, *what: object) -> np.random.Generator:
    told = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return np.random.default_rng(int.from_bytes(told, "big"))


def update_of(
    layout: Layout, state: Mapping[str, Any], *, seed: int, site: str, round_number: int
) -> NDArray[np.float32]:
    """What a hospital makes of a model in a round: a step towards its own target, and noise."""
    target = _stream(seed, site, "target").standard_normal(layout.size, np.float32)
    noise = _stream(seed, site, round_number, "noise").standard_normal(layout.size, np.float32)
    target -= layout.flatten(state)
    target *= STEP
    noise *= NOISE
    target += noise
    return target


def words_of(labels: int, *, seed: int, site: str, round_number: int) -> NDArray[np.int64]:
    """Metric words: ten patients a hospital, and noise."""
    counts = np.zeros(labels * labels + 1)
    counts[:: labels + 1] = 10 / labels
    counts += _stream(seed, site, round_number, "metrics").normal(0, 0.1, counts.size)
    return words_from_counts(counts)


class NumpyTrainer:
    """The Trainer port; a pure function of seed, site, round and model."""

    def __init__(self, task: Any, options: Mapping[str, Any], mark: Path) -> None:
        self._task, self._options, self._mark = task, options, mark
        self.starts = 0

    def ready(self) -> None:
        pass

    def close(self) -> None:
        pass

    def train(self, state: Mapping[str, Any], round_number: int) -> NDArray[np.float32]:
        # Who is killed in here leaves the mark behind.
        self._mark.write_text(str(round_number))
        time.sleep(self._options.get("train_s", 0.0))
        if self._options.get("cheap"):
            update = self._cheap(round_number)
        else:
            update = update_of(self._task.bundle.layout, state, **self._who(round_number))
        self._mark.unlink()
        return update

    def _cheap(self, round_number: int) -> NDArray[np.float32]:
        """A large update that costs little more than its memory."""
        size = self._task.bundle.layout.size
        who = self._who(round_number)
        row = _stream(who["seed"], who["site"], round_number).standard_normal(1 << 16, np.float32)
        update = np.empty(size, np.float32)
        for start in range(0, size, row.size):
            part = update[start : start + row.size]
            # Every part another one: Flower sends equal chunks once.
            np.multiply(row[: part.size], NOISE * np.float32(1 + start / size), out=part)
        return update

    def measure(self, state: Mapping[str, Any], round_number: int) -> NDArray[np.int64]:
        del state
        return words_of(len(self._task.bundle.study.labels), **self._who(round_number))

    def statistics(self) -> NDArray[np.int64]:
        raise AssertionError("the tests' study counts no statistics")

    def export(self, folder: Path, state: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", state)

    def _who(self, round_number: int) -> dict[str, Any]:
        seed = self._options["seed"]
        return {"seed": seed, "site": self._task.site, "round_number": round_number}


class _Wall:
    """The wall clock plus what a file says, in seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def now(self) -> float:
        try:
            offset = float(self._path.read_text())
        except (OSError, ValueError):
            offset = 0.0
        return time.time() + offset  # noqa: TID251 - the tests' own clock


def main(path: Path) -> int:
    """Run the hospital of a site.yaml until a signal ends it: as `client.operate.operate`."""
    from client.app import app, bind
    from client.config import SiteConfig
    from client.enrol import pinned, transport_keys
    from client.flower import FleetLink
    from client.folders import HospitalFolder
    from client.hospital import HospitalHost
    from client.link import LinkLimits, LinkWorld
    from client.operate import Operation
    from common.config import load
    from common.logs import open_log

    options = json.loads((path.parent / OPTIONS).read_text())
    config = load(path, SiteConfig)
    folder = HospitalFolder(config.state_folder(path))
    pin = pinned(folder.root)
    log = open_log(folder.log)
    host = HospitalHost(
        config,
        path,
        coordinator=pin.coordinator,
        log=log,
        maker=lambda task: NumpyTrainer(task, options, path.parent / MARK),
    )
    bind(host)
    limits = LinkLimits(config.link.bits_per_second, config.link.hours)
    world = LinkWorld(
        wall=_Wall(path.parent / "clock.txt"),
        log=log,
        heartbeat_s=options.get("heartbeat_s", 2.0),
    )

    def make(key: Path, beat: Any) -> FleetLink:
        return FleetLink(
            pin.url,
            pin.ca,
            key,
            app,
            {},
            state=folder.root,
            limits=limits,
            beat=beat,
            world=world,
        )

    operation = Operation(host, transport_keys(folder.root), make, log)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: operation.stop())
    try:
        operation.run()
    finally:
        host.close()
        _tell_use(path.parent / "use.json")
    return 0


def _tell_use(path: Path) -> None:
    """What the process cost, for the benchmarks."""
    use = resource.getrusage(resource.RUSAGE_SELF)
    told = {"cpu_s": use.ru_utime + use.ru_stime, "peak_bytes": use.ru_maxrss * 1024}
    path.write_text(json.dumps(told))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main(Path(sys.argv[1])))
