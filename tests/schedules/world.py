"""A whole federation in one process: virtual clock, faulty network, crashing parties, memory disks.

The same machines and drivers as in production; only the five ports differ. Every site of
every round contributes a tracer: in round r site i adds exactly 1 at coordinate i, so that a
completed round's mean update shows who is in it, once, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from client.daemon import SiteDaemon
from client.round.effects import Work, Worked
from client.round.machine import SiteRound
from common.crypto.identity import SiteKey
from common.errors import Code, StorageError
from common.protocol.terms import Terms
from common.protocol.transcript import Chain
from common.protocol.wire import Witness
from common.secagg.quorum import colluders, quorum
from common.statistics import StatisticsLayout, patient_words
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec
from common.world import ManualClock, MemoryJournal, SeededEntropy
from server.driver import CoordinatorDriver
from server.round.effects import Aborted, Completed
from server.round.machine import CoordinatorRound
from server.round.state import Deadlines

TRACER_EXPONENT = 12


class Crash(BaseException):
    """The process is gone, at once."""


def make_terms(
    sites: list[str],
    keys: dict[str, SiteKey],
    *,
    rounds: int = 3,
    spare: int = 12,
    bits: int = 24,
    every: int = 1,
    private: bool = True,
    c: int | None = None,
    extra: int = 3,
    features: int = 0,
    joint: bool = False,
) -> Terms:
    n = len(sites)
    layout = Layout((TensorSpec("tracer", (n + extra,)),))
    optimizer = ServerOptimizer(OptimizerSettings(name="fedavg", learning_rate=1.0))
    statistics = StatisticsLayout(features) if features else None
    counted = {} if statistics is None else statistics.initial()
    return Terms(
        study=hashlib.sha256(f"study-{n}-{rounds}-{bits}".encode()).digest(),
        roster={s: keys[s].public for s in sites},
        quorum=quorum(n, colluders(n) if c is None else c),
        weights=dict.fromkeys(sites, 1.0),
        layout=layout,
        ring_bits=bits,
        metric_words=n + 1,
        initial={**optimizer.initial({"tracer": np.zeros(n + extra, np.float32)}), **counted},
        exponents=(TRACER_EXPONENT,),
        optimizer=optimizer,
        turns=rounds,
        evaluate_every=every,
        rounds=rounds + 1 + spare + bool(features),
        private=private,
        burns_tolerated=spare,
        statistic_words=3 * features,
        statistics=statistics,
        joint=joint,
    )


def statistic_tracer(words: int, index: int) -> np.ndarray:
    """What site `index` counts: index + 2 patients, whose values differ from site to site."""
    part = np.full((1, words // 3), 1 / (index + 2))
    return patient_words(part) * (index + 2)


class TracerWorker:
    """A hospital whose update is 1 at its own coordinate; its ledger is a hash chain in memory."""

    def __init__(
        self, terms: Terms, site: str, ledger: list[bytes], fail: Callable[[], None]
    ) -> None:
        self.terms, self.site, self.ledger = terms, site, ledger
        self.reservations: list[int] = []
        self.released: list[int] = []
        self.final: Chain | None = None
        self.kill_switch = False
        self._fail = fail

    def work(self, request: Work) -> Worked:
        self._fail()
        self.ledger.append(
            hashlib.sha256(
                (self.ledger[-1] if self.ledger else b"") + str(request.round).encode()
            ).digest()
        )
        self.reservations.append(request.round)
        self._fail()
        index = self.terms.parties.index(self.site)
        update = metrics = None
        if request.trains:
            update = np.zeros(self.terms.layout.size, np.float32)
            update[index] = 1.0
            if self.terms.joint:  # the same in words of the grid
                update = (update * 2**TRACER_EXPONENT).astype(np.int32)
        if request.measures:
            metrics = np.zeros(self.terms.metric_words, np.int64)
            metrics[index] = 1
            metrics[-1] = -5
        statistics = None
        if request.counts:
            statistics = statistic_tracer(self.terms.statistic_words, index)
        return Worked(update, metrics, Witness(len(self.ledger), self.ledger[-1]), statistics)

    def release(self, round_number: int) -> None:
        self.released.append(round_number)

    def stopped(self) -> bool:
        return self.kill_switch

    def finished(self, chain: Chain) -> None:
        self.final = chain


@dataclass
class Disk(MemoryJournal):
    """A memory disk that can crash before or after the n-th write, or be full."""

    fail: Callable[[str], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        MemoryJournal.__init__(self)

    def store(self, record: bytes) -> None:
        self.fail("before-store")
        super().store(record)
        self.fail("after-store")

    def put_blob(self, name, parts, *, durable: bool = True) -> None:
        self.fail("before-blob")
        super().put_blob(name, parts, durable=durable)
        self.fail("after-blob")


class Events:
    """An audit stand-in that keeps everything in order."""

    def __init__(self, owner: str, log: list[str]) -> None:
        self.owner, self.log = owner, log

    def record(self, event: str, fields: dict[str, object]) -> None:
        shown = {
            k: v
            for k, v in fields.items()
            if k not in {"transcript", "header", "uh1", "uh2", "root", "commit", "run"}
        }
        self.log.append(f"{self.owner} {event} {sorted(shown.items())}")


class Party:
    """A process that can be killed and started again from its disk."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.disk = Disk()
        self.up = False

    def kill(self) -> None:
        self.up = False


class SiteParty(Party):
    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.ledger: list[bytes] = []
        self.worker: TracerWorker | None = None
        self.daemon: SiteDaemon | None = None
        self.reserved: list[int] = []

    def start(self) -> None:
        worker = TracerWorker(
            self.world.terms, self.name, self.ledger, lambda: self.world.fault_point(self, "work")
        )
        worker.reservations = self.reserved
        self.worker = worker
        machine = SiteRound(
            self.world.terms,
            self.name,
            self.world.keys[self.name],
            self.world.entropy[self.name],
            ledger_contains=self._contains,
            record=self.disk.load(),
        )
        self.daemon = SiteDaemon(
            machine,
            journal=self.disk,
            transport=Port(self.world, self),
            worker=worker,
            evidence=Events(self.name, self.world.events),
        )
        self.up = True
        self.world.guard(self, self.daemon.start)

    @property
    def ended(self) -> str:
        """Why this site left the run for good, if it did."""
        return "" if self.daemon is None else self.daemon._machine.record.ended

    def _contains(self, counter: int, head: bytes) -> bool:
        return counter <= len(self.ledger) and (counter == 0 or self.ledger[counter - 1] == head)

    def receive(self, payload: bytes) -> None:
        assert self.daemon is not None
        daemon = self.daemon
        self.world.guard(self, lambda: daemon.receive(payload))


class CoordinatorParty(Party):
    def __init__(self, world: World) -> None:
        super().__init__(world, "coordinator")
        self.driver: CoordinatorDriver | None = None

    def start(self) -> None:
        machine = CoordinatorRound(
            self.world.terms,
            self.world.deadlines,
            self.world.entropy["coordinator"],
            patience=self.world.patience,
            record=self.disk.load(),
            blob=self.disk.get_blob,
        )
        self.driver = CoordinatorDriver(
            machine,
            journal=self.disk,
            transport=Port(self.world, self),
            clock=self.world.clock,
            evidence=Events("coordinator", self.world.events),
            observer=self.world,
        )
        self.up = True
        driver = self.driver
        self._recover(machine)
        self.world.guard(self, driver.start)

    def _recover(self, machine: CoordinatorRound) -> None:
        """A round that completed just before a crash is reported from its certificate."""
        last = machine.last_completed()
        if last is not None and last.round not in {r.round for r in self.world.rounds}:
            self.world.completed(last, machine.chain)

    def receive(self, site: str, payload: bytes) -> None:
        assert self.driver is not None
        driver = self.driver
        self.world.guard(self, lambda: driver.receive(site, payload))


@dataclass
class Port:
    world: World
    party: Party

    def send(self, recipient: str, payload: bytes) -> None:
        self.world.fault_point(self.party, "before-send")
        self.world.post(self.party.name, recipient, payload)
        self.world.fault_point(self.party, "after-send")


class World:
    """The federation. `network` may drop, repeat, delay, reorder or alter a message."""

    def __init__(
        self,
        n: int = 4,
        *,
        seed: str = "0",
        rounds: int = 3,
        spare: int = 12,
        patience: int | None = 12,
        bits: int = 24,
        private: bool = True,
        every: int = 1,
        c: int | None = None,
        features: int = 0,
        joint: bool = False,
    ) -> None:
        self.sites = [f"site-{i:02d}" for i in range(1, n + 1)]
        self.keys = {
            s: SiteKey.from_seed(hashlib.sha256(f"key-{s}".encode()).digest()) for s in self.sites
        }
        self.entropy = {s: SeededEntropy(f"{seed}-{s}") for s in [*self.sites, "coordinator"]}
        self.terms = make_terms(
            self.sites,
            self.keys,
            rounds=rounds,
            spare=spare,
            bits=bits,
            private=private,
            every=every,
            c=c,
            features=features,
            joint=joint,
        )
        self.clock = ManualClock()
        self.deadlines = Deadlines(10, 10, 10, 10, 10)
        self.patience = patience
        self.events: list[str] = []
        self.wire: list[tuple[str, str, bytes]] = []
        self.queue: deque[tuple[str, str, bytes]] = deque()
        self.rounds: list[Completed] = []
        self.chains: list[Chain] = []
        self.aborts: list[Aborted] = []
        self.refusals: list[tuple[str, Code]] = []
        self.final: Chain | None = None
        self.network: Callable[[str, str, bytes], list[tuple[str, str, bytes]]] = lambda a, b, p: [
            (a, b, p)
        ]
        self.fault: Callable[[Party, str], None] = lambda _party, _point: None
        self.coordinator = CoordinatorParty(self)
        self.parties = {s: SiteParty(self, s) for s in self.sites}
        for party in [self.coordinator, *self.parties.values()]:
            party.disk.fail = self._disk_fault(party)
        self.crashes: list[str] = []

    def _disk_fault(self, party: Party) -> Callable[[str], None]:
        return lambda point: self.fault_point(party, point)

    def fault_point(self, party: Party, point: str) -> None:
        self.fault(party, point)

    def guard(self, party: Party, action: Callable[[], None]) -> None:
        """Run a party's code; a crash or a failed disk takes only that party down."""
        try:
            action()
        except Crash:
            party.kill()
            self.crashes.append(party.name)
            self.events.append(f"{party.name} crashed")
        except StorageError as error:
            party.kill()
            self.crashes.append(party.name)
            self.events.append(f"{party.name} stopped {error.code.label}")

    # ---- observer
    def completed(self, result: Completed, chain: Chain) -> None:
        self.rounds.append(result)
        self.chains.append(chain)

    def aborted(self, result: Aborted) -> None:
        self.aborts.append(result)

    def refused(self, site: str, code: Code) -> None:
        self.refusals.append((site, code))

    def over(self, chain: Chain) -> None:
        self.final = chain

    # ---- network
    def post(self, sender: str, recipient: str, payload: bytes) -> None:
        self.wire.append((sender, recipient, payload))
        self.queue.extend(self.network(sender, recipient, payload))

    def deliver(self) -> None:
        sender, recipient, payload = self.queue.popleft()
        if recipient == "coordinator":
            if self.coordinator.up:
                self.coordinator.receive(sender, payload)
        elif self.parties[recipient].up:
            self.parties[recipient].receive(payload)

    def start(self, *, absent: tuple[str, ...] = ()) -> None:
        for site, party in self.parties.items():
            if site not in absent:
                party.start()
        self.coordinator.start()

    def step(self) -> None:
        """One delivery, or the next moment at which the coordinator acts."""
        if self.queue:
            self.deliver()
            return
        if not self.coordinator.up:
            return
        driver = self.coordinator.driver
        assert driver is not None
        self.clock.skip_to(driver.machine.next_wakeup)
        self.guard(self.coordinator, driver.tick)

    def run(self, limit: int = 20_000, until: Callable[[], bool] | None = None) -> None:
        for _ in range(limit):
            if until is not None and until():
                return
            if self.final is not None and not self.queue:
                return
            self.step()
        raise AssertionError(
            f"no end after {limit} steps; phase {self.coordinator.driver.machine.phase}"
        )

    # ---- what must hold
    def check(self) -> None:
        """Every completed round shows its survivors exactly once, and nothing else."""
        trained = np.zeros(self.terms.layout.size, np.float32)
        for result, chain in zip(self.rounds, self.chains, strict=True):
            index = [self.terms.parties.index(s) for s in result.survivors]
            assert len(result.survivors) >= self.terms.quorum
            if result.kind == "statistics":
                total = sum(statistic_tracer(self.terms.statistic_words, i) for i in index)
                for name, value in self.terms.statistics.resolve(total, len(index)).items():
                    assert np.array_equal(chain.state[name], value)
            if result.kind == "train":
                mean = np.zeros_like(trained)
                mean[index] = np.float32(1.0 / len(index))
                trained = trained + mean
                assert np.array_equal(chain.state["tracer"], trained), (
                    chain.state["tracer"],
                    trained,
                )
            if result.metrics is not None:
                expected = np.zeros(self.terms.metric_words, np.int64)
                expected[index] = 1
                expected[-1] = -5 * len(index)
                assert np.array_equal(result.metrics, expected)
        for party in self.parties.values():
            assert len(party.reserved) == len(set(party.reserved)), "a round was reserved twice"
