"""What an attacker's hands need: stop a run at a message, alter it, see what the victim does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from schedule import Schedule, kind_of
from world import World

from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError
from common.protocol.wire import (
    Head,
    Refusal,
    Signed,
    pack,
    pack_statement,
    sign,
    unpack_body,
    unpack_from_coordinator,
    unpack_from_site,
)

LIMIT = 2**26
VICTIM = "site-03"
COLLUDER = "site-01"
RELEASES = {"Ready", "Upload", "Agree", "Unmask", "Burn", "Dispute"}
# What a wrong message may never bring out: a commitment, a second upload, a signature, a share.


def federation(n: int = 5, **settings: Any) -> Schedule:
    """Five hospitals, quorum four, one colluder withstood."""
    return Schedule(n, **{"seed": "rogue", "rounds": 2, "spare": 20, **settings})


def halt(
    world: World, kind: str, recipient: str, *, nth: int = 1, sender: str | None = None
) -> Any:
    """Run until the n-th message of this kind is about to reach its recipient, and take it."""
    if not world.coordinator.up and world.coordinator.driver is None:
        world.start()
    for _ in range(20_000):
        if world.queue:
            frm, to, payload = world.queue[0]
            if to == recipient and kind_of(payload) == kind and sender in {None, frm}:
                nth -= 1
                if nth == 0:
                    world.queue.popleft()
                    return opened(recipient, payload)
            world.deliver()
        else:
            world.step()
    raise AssertionError(f"no {kind} for {recipient}")


def opened(recipient: str, payload: bytes) -> Any:
    if recipient == "coordinator":
        return unpack_from_site(payload, LIMIT)[1]
    return unpack_from_coordinator(payload, LIMIT)


@dataclass
class Reaction:
    """What a party did with a message: the codes it refused with, and all that it sent."""

    codes: list[str]
    sent: list[tuple[str, bytes]]

    @property
    def kinds(self) -> list[str]:
        return [kind_of(payload) for _, payload in self.sent]


def to_site(world: World, site: str, message: Any) -> Reaction:
    """Deliver a message (typed, or bytes) to a site and see what it does."""
    start = len(world.wire)
    world.parties[site].receive(message if isinstance(message, bytes) else pack(message))
    sent = [(to, payload) for frm, to, payload in world.wire[start:] if frm == site]
    codes = []
    for _, payload in sent:
        if kind_of(payload) == "Refusal":
            refusal: Refusal = unpack_body(Refusal, unpack_from_site(payload, LIMIT)[1])
            codes.append(refusal.code)
    return Reaction(codes, [s for s in sent if kind_of(s[1]) != "Refusal"])


def to_coordinator(world: World, site: str, payload: bytes) -> Reaction:
    """Deliver bytes to the coordinator as if from a site."""
    start, before = len(world.wire), len(world.refusals)
    world.coordinator.receive(site, payload)
    sent = [(to, payload) for frm, to, payload in world.wire[start:] if frm == "coordinator"]
    return Reaction([code.label for _, code in world.refusals[before:]], sent)


def record(world: World, site: str) -> bytes:
    """What the site would remember across a crash."""
    return world.parties[site].daemon._machine.record.dump()


def forged(key: SiteKey, statement: Any, label: str | None = None) -> Signed:
    """A statement under any key, and under any label."""
    if label is None:
        return sign(key, statement)
    body = sign(key, statement).body
    return Signed(body, key.sign(label, body))


def stranger() -> SiteKey:
    return SiteKey.from_seed(bytes(range(32)))


def swap(items: tuple[Signed, ...], at: int, item: Signed) -> tuple[Signed, ...]:
    return (*items[:at], item, *items[at + 1 :])


def flip(data: bytes, at: int = 0) -> bytes:
    data = bytes(data)
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def spend_budgets(world: World, *sites: str, code: Code = Code.BUDGET_EXCEEDED) -> None:
    """These sites say of the open round that their patients' budgets are spent."""
    at = world.coordinator.driver.machine.record.round
    for site in sites:
        refusal = Refusal(world.terms.study, site, at, code.label, "")
        statement = pack_statement(Refusal, sign(world.keys[site], refusal))
        world.coordinator.receive(site, statement)


def head_of(signed: Signed) -> Head:
    head: Head = unpack_body(Head, signed)
    return head


def rehead(world: World, signed: Signed, **changes: Any) -> Signed:
    """The head of a site with some fields changed, properly signed by that site's own key."""
    head = replace(head_of(signed), **changes)
    return sign(world.keys[head.site], head)


def fork(value: Any) -> Any:
    """An independent copy of a machine, deep where machines change things in place."""
    twin = copy.copy(value)
    for name in list(getattr(value, "__dict__", {})):
        part = getattr(value, name)
        if isinstance(part, dict | set):
            setattr(twin, name, copy.copy(part))
        elif isinstance(part, list):
            setattr(twin, name, [copy.copy(p) for p in part])
        elif name in {"state", "handshake", "opening"} and part is not None:
            setattr(twin, name, fork(part))
    return twin


def try_on(
    world: World, recipient: str, sender: str, payload: bytes
) -> tuple[str, list[Any], bool]:
    """(code or "", effects, whether the durable record changed) on a copy of the recipient."""
    if recipient == "coordinator":
        machine = fork(world.coordinator.driver.machine)
        before = machine.record
        act = lambda: machine.handle(sender, payload, world.clock.now())  # noqa: E731
    else:
        machine = fork(world.parties[recipient].daemon._machine)
        before = machine.record
        act = lambda: machine.handle(payload)  # noqa: E731
    try:
        effects = act()
    except ProtocolError as error:
        return error.code.label, [], machine.record != before
    return "", effects, machine.record != before


def finish(world: Schedule) -> None:
    """Let the run go on to its end and check everything."""
    assert world.play()
    world.check()
