"""The two Flower apps in one process, and the same run without Flower: one model, bit for bit."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from numpy.typing import NDArray

import server.app
from client.app import shell
from client.config import SiteConfig
from client.hospital import HospitalHost
from common.bundle import Bundle
from common.config import load
from common.logs import open_log
from common.statistics import STATISTIC_SCALE
from common.strategy import model_tensors
from common.tensors import state_digest
from common.world import SeededEntropy, SkippingClock
from server.app import Exchange
from server.deploy import CoordinatorRun, RunFolder, Unwatched
from server.enrol import coordinator_key
from server.network import InProcessNetwork, SiteHandle
from tests.flower.consortium import SITES, Consortium, small_bundle
from tests.flower_grid import InProcessGrid

STEP, NOISE = np.float32(0.25), np.float32(0.02)
TENSORS = Mapping[str, NDArray[np.float32]]


class NumpyTrainer:
    """A pure function of seed, site, round and model."""

    def __init__(self, task: Any, seed: str) -> None:
        self._task, self._seed = task, seed
        self._layout = task.bundle.layout

    def ready(self) -> None:
        pass

    def close(self) -> None:
        pass

    def train(self, state: TENSORS, round_number: int) -> NDArray[np.float32]:
        target = self._stream("target").standard_normal(self._layout.size, np.float32)
        noise = self._stream("noise", round_number).standard_normal(self._layout.size, np.float32)
        return (target - self._layout.flatten(state)) * STEP + noise * NOISE

    def measure(self, state: TENSORS, round_number: int) -> NDArray[np.int64]:
        words = len(self._task.bundle.study.labels) ** 2 + 1
        return self._stream("metrics", round_number).integers(0, 1 << 18, words)

    def statistics(self) -> NDArray[np.int64]:
        moments = np.repeat([0.1, 0.05, 0.25], self._task.bundle.study.feature_count)
        return np.rint(moments * 50 * STATISTIC_SCALE).astype(np.int64)

    def export(self, folder: Path, state: TENSORS) -> None:
        folder.mkdir(parents=True)

    def _stream(self, *what: object) -> np.random.Generator:
        told = hashlib.sha256(repr((self._seed, self._task.site, *what)).encode()).digest()
        return np.random.default_rng(int.from_bytes(told, "big"))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return small_bundle(training={"rounds": 3}, evaluation={"every": 2})


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Consortium:
    made = Consortium(tmp_path_factory.mktemp("enrolled"), bundle)
    made.prepared()
    return made


class Copy:
    """A consortium of its own for one run: the same keys, and the same entropy."""

    def __init__(self, origin: Consortium, root: Path, seed: str) -> None:
        shutil.copytree(origin.root, root)
        self.seed = seed
        state = root / "coordinator"
        folder = RunFolder(root / origin.prepared().root.relative_to(origin.root))
        self.key = coordinator_key(state)
        self.clock = SkippingClock()
        self.run = CoordinatorRun(
            folder,
            self.key,
            log=open_log(state / "log.jsonl"),
            clock=self.clock,
            entropy=SeededEntropy("coordinator"),
        )
        self.hosts = {site: self._host(root / site / "site.yaml", site) for site in SITES}

    def _host(self, yaml: Path, site: str) -> HospitalHost:
        return HospitalHost(
            load(yaml, SiteConfig),
            yaml,
            coordinator=self.key.public,
            entropy=SeededEntropy(site),
            maker=lambda task: NumpyTrainer(task, self.seed),
        )

    def model(self) -> dict[str, NDArray[np.float32]]:
        assert self.run.final is not None
        return dict(model_tensors(self.run.final.state))

    def directly(self) -> None:
        """Payloads go from hand to hand."""
        network = InProcessNetwork(self.clock, self.run.tap)
        network.driver = self.run.driver(network)

        def ask(site: str, payloads: tuple[bytes, ...], *, hello: bool) -> None:
            answer = self.hosts[site].ask(self.run.bundle.digest, payloads, hello=hello)
            for payload in answer.payloads:
                network.post(site, payload)

        for site in SITES:
            network.sites[site] = SiteHandle(
                lambda site=site: ask(site, (), hello=True),
                lambda payload, site=site: ask(site, (payload,), hello=False),
                lambda: None,
                up=True,
            )
            network.sites[site].start()
        network.driver.start()
        for _ in range(2000):
            if self.run.final is not None and network.quiet:
                return
            network.step()
        raise AssertionError("the run does not end")

    def over_flower(self, monkeypatch: pytest.MonkeyPatch) -> InProcessGrid:
        """The same ServerApp and ClientApps that run over a network; messages as on a wire."""
        grid = InProcessGrid()
        for node, site in enumerate(SITES, start=11):
            grid.apps[node] = shell(lambda site=site: self.hosts[site])
            grid.come(node)
        exchange = Exchange(
            grid,
            self.key,
            self.run.bundle.digest,
            self.run.keys,
            self.clock,
            registered=lambda _node: None,
            watch=Unwatched(),
            pause=lambda seconds: self.clock.skip_to(self.clock.now() + seconds),
            entropy=SeededEntropy("questions"),
        )
        monkeypatch.setattr(server.app, "_BOUND", [])
        server.app.bind(
            lambda _grid: exchange.serve(
                self.run.driver(exchange), lambda: self.run.final is not None
            )
        )
        server.app.app(grid, Context(1, 1, {}, RecordDict(), {}))
        return grid

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        self.run.close()


@contextmanager
def copied(origin: Consortium, root: Path, seed: str = "one") -> Iterator[Copy]:
    made = Copy(origin, root, seed)
    try:
        yield made
    finally:
        made.close()


def test_with_and_without_flower_the_model_is_the_same_bit_for_bit(
    enrolled: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with copied(enrolled, tmp_path / "direct") as direct:
        direct.directly()
        plain = direct.model()
    with copied(enrolled, tmp_path / "flower") as flower:
        grid = flower.over_flower(monkeypatch)
        carried = flower.model()
        assert flower.run.machine.ended is None
    assert {m.metadata.message_type for m in grid.pushed} == {
        "query.hello",
        "query.step",
        "train.step",
    }
    assert state_digest(carried) == state_digest(plain)
    # Controls: something was trained, and another seed's training is another model.
    initial = enrolled.bundle.initial
    assert any(not np.array_equal(plain[name], initial[name]) for name in initial)
    with copied(enrolled, tmp_path / "other", seed="two") as other:
        other.directly()
        assert state_digest(other.model()) != state_digest(plain)
