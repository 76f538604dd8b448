"""A hostile network: every byte of every kind of message, altered, cut, repeated or spliced in.

Each altered message is tried on a copy of its receiver: it is refused, or it has no effect. The
three questions that nobody signs (an opening, a start, a burn request) may at most move the
receiver along in ways that the next genuine message repairs: nothing is released by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rogue import COLLUDER, VICTIM, federation, finish, flip, halt, spend_budgets, try_on
from schedule import Schedule, kind_of

from client.round.effects import Final, Send
from common.errors import Code
from common.protocol.wire import (
    UPLOADS,
    Agree,
    Burn,
    BurnRequest,
    Confirm,
    Established,
    Hello,
    RunKey,
    Unmask,
    pack,
    pack_statement,
)

TO_SITE = {
    "HandshakeOpen": 1, "RunKeys": 1, "EncapsulationSet": 1, "ConfirmSet": 1, "RoundStart": 2,
    "Participants": 1, "Survivors": 1, "Agreements": 1, "BurnRequest": 1, "Finished": 1, "Ended": 1,
}  # fmt: skip
TO_COORDINATOR = [
    "RunKey",
    "EncapsulationUpload",
    "Confirm",
    "Established",
    "Ready",
    "Upload",
    "Agree",
    "Unmask",
    "Hello",
    "Burn",
]
STATEMENTS = {k.__name__: k for k in (RunKey, Confirm, Established, Agree, Unmask, Hello, Burn)}
UNSIGNED = {"HandshakeOpen", "RoundStart", "BurnRequest", "Finished", "Ended"}
SECRET = {"Ready", "Upload", "Agree", "Unmask", "Dispute"}


def moment(kind: str, recipient: str, seed: str = "rogue") -> tuple[Schedule, str, bytes]:
    """A federation in which one genuine message of this kind is about to arrive."""
    world = federation(seed=seed)
    sender = "coordinator" if recipient != "coordinator" else COLLUDER
    if kind in {"Burn", "BurnRequest"}:
        halt(world, "Ready", "coordinator", sender="site-02")
        for site in ("site-04", "site-05"):
            world.gone.add(site)
            world.parties[site].kill()
    if kind == "Ended":
        halt(world, "Agree", "coordinator", sender=VICTIM)
        spend_budgets(world, COLLUDER, "site-02")
    nth = TO_SITE.get(kind, 1) if recipient != "coordinator" else 1
    message = halt(world, kind, recipient, nth=nth, sender=sender)
    signed = kind in STATEMENTS and kind not in {u.__name__ for u in UPLOADS}
    return world, sender, pack_statement(STATEMENTS[kind], message) if signed else pack(message)


def corrupted(payload: bytes) -> Iterator[bytes]:
    places = {
        *range(min(40, len(payload))),
        *np.linspace(0, len(payload) - 1, 80).astype(int).tolist(),
    }
    for place in sorted(places):
        yield flip(payload, place)
        yield payload[:place] + bytes([payload[place] ^ 0x80]) + payload[place + 1 :]


def truncated(payload: bytes) -> Iterator[bytes]:
    for length in {0, 1, 8, 9, 17, 18, len(payload) // 2, len(payload) - 17, len(payload) - 1}:
        yield payload[:length]
    yield payload + b"\0"


def harmless(world: Schedule, kind: str, recipient: str, sender: str, bad: bytes) -> bool:
    """Whether it was refused; asserts that it had no effect where it was not."""
    code, effects, changed = try_on(world, recipient, sender, bad)
    if code:
        assert not effects
        assert not changed
        return True
    sent = {kind_of(e.payload) for e in effects if isinstance(e, Send)}
    if kind in UNSIGNED:
        assert not sent & SECRET
        # A sum is the coordinator's word (PROTOCOL.md, 9). It shows in the next round's headers,
        # and after an early end there is none: who can speak as the coordinator is the envelope's.
        genuine = world.coordinator.driver.machine.chain.state_digest
        finals = [e.chain.state_digest for e in effects if isinstance(e, Final)]
        assert kind == "Ended" or all(final == genuine for final in finals)
    else:
        assert not changed
        assert not effects
    return False


CASES = [(kind, VICTIM) for kind in TO_SITE] + [(kind, "coordinator") for kind in TO_COORDINATOR]


@pytest.mark.parametrize("damage", [corrupted, truncated], ids=lambda d: d.__name__)
@pytest.mark.parametrize(("kind", "recipient"), CASES, ids=str)
def test_a_damaged_message_is_refused_or_does_nothing(
    kind: str, recipient: str, damage: Callable[[bytes], Iterator[bytes]]
):
    world, sender, payload = moment(kind, recipient)
    refused = [harmless(world, kind, recipient, sender, bad) for bad in damage(payload)]
    if damage is truncated or kind not in UNSIGNED:
        assert all(refused)
    assert sum(refused) > len(refused) // 3
    world.queue.appendleft((sender, recipient, payload))
    if kind not in {"Burn", "BurnRequest"}:
        finish(world)


@pytest.mark.parametrize("kind", [k for k in TO_SITE if k not in {"HandshakeOpen", "BurnRequest"}])
def test_a_message_of_another_run_is_refused(kind: str):
    world, sender, _ = moment(kind, VICTIM)
    _, _, spliced = moment(kind, VICTIM, seed="another run")
    code, effects, changed = try_on(world, VICTIM, sender, spliced)
    assert code
    assert not effects
    assert not changed


@pytest.mark.parametrize("kind", [k for k in TO_COORDINATOR if k not in {"Hello", "Burn"}])
def test_a_sites_message_of_another_run_is_refused(kind: str):
    world, sender, payload = moment(kind, "coordinator")
    other = federation(seed="another run")
    spliced = halt(other, kind, "coordinator", sender=COLLUDER)
    statement = kind in STATEMENTS
    raw = pack_statement(STATEMENTS[kind], spliced) if statement else pack(spliced)
    assert raw != payload
    code, effects, changed = try_on(world, "coordinator", sender, raw)
    assert code
    assert not effects
    assert not changed


def test_everything_a_site_ever_received_can_be_replayed_at_any_later_moment():
    """The whole history again after every round: nothing new is said, and the run still ends."""
    world = federation()
    for nth in (1, 1):
        held = halt(world, "Participants", VICTIM, nth=nth)
        history = [p for _, to, p in world.wire if to == VICTIM]
        start = len(world.wire)
        for payload in history:
            if kind_of(payload) != "Participants":
                world.parties[VICTIM].receive(payload)
        sent = {kind_of(p) for frm, _, p in world.wire[start:] if frm == VICTIM}
        assert sent <= {"Refusal", "Ready"}
        world.queue.appendleft(("coordinator", VICTIM, pack(held)))
        halt(world, "Survivors", VICTIM)
        world.queue.appendleft(
            (
                "coordinator",
                VICTIM,
                next(
                    p
                    for _, to, p in reversed(world.wire)
                    if to == VICTIM and kind_of(p) == "Survivors"
                ),
            )
        )
    finish(world)


def test_everything_the_coordinator_ever_received_can_be_replayed():
    world = federation()
    halt(world, "RoundStart", VICTIM, nth=2)
    history = [(frm, p) for frm, to, p in world.wire if to == "coordinator"]
    for sender, payload in history:
        world.coordinator.receive(sender, payload)
    finish(world)


def test_the_messages_of_a_round_in_reverse_order_release_nothing():
    world = federation()
    halt(world, "RoundStart", VICTIM, nth=2)
    seen = world.parties[VICTIM].daemon._machine.record
    history = [
        p
        for _, to, p in world.wire
        if to == VICTIM and kind_of(p) in {"Agreements", "Survivors", "Participants"}
    ]
    assert len(history) == 3
    other = federation()
    halt(other, "RoundStart", VICTIM)
    for payload in reversed(history):
        code, effects, changed = try_on(other, VICTIM, "coordinator", payload)
        assert code in {Code.ROUND_OUT_OF_ORDER.label, Code.ROUND_WRONG_RUN.label}
        assert not effects
        assert not changed
    assert seen.stage == "done"


def test_relabelled_senders_are_refused():
    """The network may swap who is said to have sent a message: the signature says who did."""
    world, _, payload = moment("Ready", "coordinator")
    for site in ("site-02", VICTIM):
        code, effects, changed = try_on(world, "coordinator", site, payload)
        assert code
        assert not effects
        assert not changed


def test_the_trial_can_tell_an_effect_from_none():
    """Control: the genuine messages do have effects on the same copies."""
    for kind, recipient in CASES:
        if kind in {"Established", "Confirm", "RunKey", "EncapsulationUpload", "Hello", "Burn"}:
            continue
        world, sender, payload = moment(kind, recipient)
        before: Any = world.coordinator.driver.machine
        code, effects, changed = try_on(world, recipient, sender, payload)
        assert not code, (kind, code)
        machine_moved = recipient == "coordinator"
        assert effects or changed or machine_moved, kind
        assert world.coordinator.driver.machine is before
    assert BurnRequest.__name__ in UNSIGNED
