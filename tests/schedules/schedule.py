"""Fault schedules: a seed decides what goes wrong, when, and to whom; the invariants decide the rest.

A schedule is a World in which processes die at counted fault points and come back, disks fill
up for a while, messages are lost, repeated, delayed, reordered, replayed and damaged, and
sites come late or never return. One thread, virtual time, seeded entropy: a seed is a bug
report. Every wire message of a site is watched for what must never be said twice.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from world import Crash, Party, World

from common.errors import AbortedRound, Code, StorageError
from common.protocol.wire import Agree, Burn, Unmask, unpack_body, unpack_from_site

# A site that has heard nothing for so long says hello again; the daemon's owner does that.
SILENCE = 45.0
RESUMES = 6
MESSAGE_FAULTS = ("drop", "duplicate", "delay", "reorder", "replay", "corrupt", "truncate")
PROCESS_FAULTS = ("crash", "crash", "full")


def kind_of(payload: bytes) -> str:
    """The message's tag, read from its encoding: list head, string head, tag."""
    size = int.from_bytes(payload[10:18], "big")
    return payload[18 : 18 + size].decode("ascii", "replace")


@dataclass
class Said:
    """What each site said that it may say once only, by (site, round)."""

    uploads: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    agrees: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    burns: set[tuple[str, int]] = field(default_factory=set)
    self_shares: dict[tuple[str, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    recovery_shares: dict[tuple[str, int], set[str]] = field(
        default_factory=lambda: defaultdict(set)
    )
    unmasks: dict[tuple[str, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))

    def hear(self, site: str, at: int, payload: bytes) -> None:
        kind = kind_of(payload)
        if kind == "Upload":
            self.uploads[site, at].add(hashlib.sha256(payload).digest())
        elif kind in {"Agree", "Burn", "Unmask"}:
            _, signed = unpack_from_site(payload, 2**24)
            self._statement(site, at, kind, signed)

    def _statement(self, site, at, kind, signed) -> None:
        if kind == "Agree":
            agree = unpack_body(Agree, signed)
            self.agrees[site, agree.round].add(signed.body)
        elif kind == "Burn":
            self.burns.add((site, unpack_body(Burn, signed).round))
        else:
            unmask = unpack_body(Unmask, signed)
            self.unmasks[site, at].add(signed.body)
            self.self_shares[site, at] |= set(unmask.self_shares)
            self.recovery_shares[site, at] |= set(unmask.recovery_shares)

    def check(self) -> None:
        for what in (self.uploads, self.agrees, self.unmasks):
            for key, seen in what.items():
                assert len(seen) == 1, f"{key} said two different things"
        assert not self.burns & set(self.agrees), "a site burned and agreed"
        for key, shares in self.self_shares.items():
            assert not shares & self.recovery_shares[key], f"{key} released both secrets of a site"


class Schedule(World):
    """A World with a calendar, a storm and witnesses.

    `at_point` maps (party, n-th fault point) to what happens there; `at_message` maps the
    n-th posted message to what the network does with it.
    """

    def __init__(self, n: int, *, seed: str, **settings) -> None:
        super().__init__(n, seed=seed, **settings)
        self.at_point: dict[tuple[str, int], Callable[[Party, str], None]] = {}
        self.at_message: dict[int, tuple[str, int]] = {}
        self.points: dict[str, int] = defaultdict(int)
        self.full_until: dict[str, float] = defaultdict(float)
        self.cut_until: dict[str, float] = defaultdict(float)
        self.gone: set[str] = set()
        self.said = Said()
        self.waits: list[AbortedRound] = []
        self.steps = 0
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._posted = 0
        self._heard: dict[str, float] = dict.fromkeys(self.sites, 0.0)
        self.network = self._weather

    # ---- calendar
    def later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._calendar, (self.clock.now() + seconds, next(self._order), action))

    def restart(self, party: Party) -> None:
        if not party.up and party.name not in self.gone:
            self.events.append(f"{party.name} restarts")
            self._heard[party.name] = self.clock.now()
            party.start()
            if not party.up:
                self.later(7.0, lambda: self.restart(party))

    # ---- faults
    def fault_point(self, party: Party, point: str) -> None:
        if (
            point in {"before-store", "before-blob"}
            and self.clock.now() < self.full_until[party.name]
        ):
            raise StorageError(Code.JOURNAL_WRITE, "No space left on device.")
        self.points[party.name] += 1
        action = self.at_point.get((party.name, self.points[party.name]))
        if action is not None:
            action(party, point)

    def crash(self, seconds: float | None) -> Callable[[Party, str], None]:
        """Die here; come back after some seconds, or never."""

        def act(party: Party, point: str) -> None:
            self.events.append(f"{party.name} dies {point}")
            if seconds is None:
                self.gone.add(party.name)
            else:
                self.later(seconds, lambda: self.restart(party))
            raise Crash

        return act

    def full(self, seconds: float) -> Callable[[Party, str], None]:
        """The disk is full from here for some seconds; the process stops at its next write."""

        def act(party: Party, point: str) -> None:
            self.full_until[party.name] = self.clock.now() + seconds
            self.later(seconds + 1, lambda: self.restart(party))

        return act

    def guard(self, party: Party, action: Callable[[], None]) -> None:
        try:
            super().guard(party, action)
        except AbortedRound as error:
            self.waits.append(error)
            self.events.append(f"coordinator gives up for now {error.code.label}")
            party.kill()
            if len(self.waits) <= RESUMES:
                self.later(20.0, lambda: self.restart(party))

    # ---- network
    def post(self, sender: str, recipient: str, payload: bytes) -> None:
        if sender != "coordinator":
            at = self.parties[sender].daemon._machine.record.round
            self.said.hear(sender, at, payload)
        super().post(sender, recipient, payload)

    def _weather(self, sender: str, recipient: str, payload: bytes) -> list[tuple[str, str, bytes]]:
        self._posted += 1
        now = self.clock.now()
        letter = (sender, recipient, payload)
        if now < self.cut_until[sender] or now < self.cut_until[recipient]:
            return []
        kind, value = self.at_message.get(self._posted, ("", 0))
        if kind:
            self.events.append(f"network {kind} {sender} {recipient} {kind_of(payload)}")
        if kind in {"", "replay"}:
            old = [w for w in self.wire if w[1] == recipient] if kind else []
            return [letter, *old[value % len(old) : value % len(old) + 1]] if old else [letter]
        if kind == "drop":
            return []
        if kind == "duplicate":
            return [letter, letter]
        if kind == "delay":
            self.later(1 + value % 35, lambda: self.queue.append(letter))
            return []
        if kind == "reorder":
            self.queue.insert(value % (len(self.queue) + 1), letter)
            return []
        return [(sender, recipient, damaged(payload, kind, value))]

    def deliver(self) -> None:
        self._heard[self.queue[0][1]] = self.clock.now()
        super().deliver()

    # ---- time
    def finished(self) -> bool:
        if self.final is None or self.queue:
            return False
        return all(p.worker.final is not None or p.ended for p in self.parties.values() if p.up)

    def play(self, limit: int = 6_000) -> bool:
        """Run to the end; True where the run finished."""
        for self.steps in range(limit):
            if self.finished() and not self._calendar:
                return True
            if self.queue:
                self.deliver()
            elif not self._pass_time():
                return self.finished()
        raise AssertionError(f"no end after {limit} steps")

    def _pass_time(self) -> bool:
        moments = [self._calendar[0][0]] if self._calendar else []
        awake = self.coordinator.up and self.final is None
        if awake:
            moments.append(self.coordinator.driver.machine.next_wakeup)
        if self.coordinator.up:
            moments += [
                self._heard[s] + SILENCE
                for s, p in self.parties.items()
                if p.up and p.worker.final is None
            ]
        if not moments:
            return False
        self.clock.skip_to(min(moments))
        now = self.clock.now()
        while self._calendar and self._calendar[0][0] <= now:
            heapq.heappop(self._calendar)[2]()
        for site, party in self.parties.items():
            if party.up and party.worker.final is None and self._heard[site] + SILENCE <= now:
                self._heard[site] = now
                self.guard(party, party.daemon.start)
        if self.coordinator.up and self.final is None:
            self.guard(self.coordinator, self.coordinator.driver.tick)
        return True

    # ---- what must hold
    def check(self) -> None:
        super().check()
        self.said.check()
        for site, at in self.said.uploads:
            party = self.parties[site]
            assert at in party.reserved, "an upload without a reservation"
        for site, party in self.parties.items():
            assert len(party.ledger) == len(party.reserved)
            uploads = [at for name, at in self.said.uploads if name == site]
            assert len(party.reserved) >= len(uploads)
        if self.final is not None:
            counted = ["statistics"] if self.terms.statistic_words else []
            kinds = [*counted, *["train"] * self.terms.turns, "evaluate"]
            if self.coordinator.driver.machine.ended is not None:
                kinds = kinds[: len(self.rounds)]
            assert [r.kind for r in self.rounds] == kinds
            for party in self.parties.values():
                if party.up and party.worker.final is not None:
                    assert party.worker.final.state_digest == self.final.state_digest

    def digest(self) -> str:
        """Everything that happened, in order, without what is random by nature."""
        log = "\n".join(
            [*self.events, *(f"{a} {b} {kind_of(p)} {len(p)}" for a, b, p in self.wire)]
        )
        return hashlib.sha256(log.encode()).hexdigest()


def damaged(payload: bytes, kind: str, value: int) -> bytes:
    """One byte altered, or the tail cut off."""
    at = value % len(payload)
    if kind == "truncate":
        return payload[:at]
    return payload[:at] + bytes([payload[at] ^ (1 + value % 255)]) + payload[at + 1 :]


def storm(seed: int, *, returning: bool = False, private: bool = True, **settings) -> Schedule:
    """The schedule of a seed: 3 to 8 sites, 2 to 4 turns, 0 to 12 faults."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(3, 9))
    world = Schedule(
        n,
        seed=str(seed),
        rounds=int(draw.integers(2, 5)) - 1,
        spare=60,
        private=private,
        **settings,
    )
    absent: list[str] = []
    spare_sites = n - world.terms.quorum
    for _ in range(int(draw.integers(0, 13))):
        kind = str(draw.choice(["message", "message", "process", "partition", "late", "gone"]))
        site = str(draw.choice(world.sites))
        seconds = float(draw.integers(0, 60))
        if kind == "message":
            plan = (str(draw.choice(MESSAGE_FAULTS)), int(draw.integers(0, 2**31)))
            world.at_message[int(draw.integers(1, 60 * n))] = plan
        elif kind == "process":
            _plan_process(world, draw, site, seconds)
        elif kind == "partition":
            start, length = float(draw.integers(0, 30)), float(draw.choice([5, 30, 120, 400]))
            world.later(
                start,
                lambda s=site, d=length: world.cut_until.__setitem__(s, world.clock.now() + d),
            )
        elif kind == "late" and site not in absent:
            absent.append(site)
            world.later(seconds, lambda s=site: world.restart(world.parties[s]))
        elif kind == "gone" and not returning and spare_sites > 0:
            spare_sites -= 1
            world.at_point[site, int(draw.integers(1, 60))] = world.crash(None)
    world.absent = tuple(absent)
    return world


def _plan_process(world: Schedule, draw: np.random.Generator, site: str, seconds: float) -> None:
    kind = str(draw.choice(PROCESS_FAULTS))
    victim = "coordinator" if draw.integers(0, 3) == 0 else site
    reach = 60 * len(world.sites) if victim == "coordinator" else 60
    point = (victim, int(draw.integers(1, reach)))
    world.at_point[point] = world.crash(seconds) if kind == "crash" else world.full(seconds)


def play(seed: int, **settings) -> Schedule:
    """Run a seed to its end and check everything that must hold."""
    world = storm(seed, **settings)
    world.start(absent=world.absent)
    world.play()
    world.check()
    return world
