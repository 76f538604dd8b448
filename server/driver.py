"""Executes the coordinator's effects in order: durable first, then sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from common.errors import Code, ProtocolError
from common.evidence import Evidence
from common.ports import Clock, Journal, Transport
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.transcript import Chain
from common.study import Study
from server.round.effects import Aborted, Completed, Effect, RunOver, SendEach, SendTo
from server.round.machine import CoordinatorRound
from server.round.state import Deadlines


class Observer(Protocol):
    """Who watches a run: the live table, the report, a test."""

    def completed(self, result: Completed, chain: Chain) -> None:
        """A round ended in an aggregate; `chain` is the model after it."""
        ...

    def aborted(self, result: Aborted) -> None:
        """A round ended without one."""
        ...

    def refused(self, site: str, code: Code) -> None:
        """A site's message was refused."""
        ...

    def over(self, chain: Chain) -> None:
        """The run is complete."""
        ...


class CoordinatorDriver:
    """The coordinator's running process: a machine and the world it acts on.

    `tidy` is called where about as much as a model was freed, before as much is made.
    """

    def __init__(
        self,
        machine: CoordinatorRound,
        *,
        journal: Journal,
        transport: Transport,
        clock: Clock,
        evidence: Evidence,
        observer: Observer,
        tidy: Callable[[], None] = lambda: None,
    ) -> None:
        self.machine = machine
        self._journal = journal
        self._transport = transport
        self._clock = clock
        self._evidence = evidence
        self._observer = observer
        self._tidy = tidy

    def start(self) -> None:
        """Begin or resume the run. Raises AbortedRound, StorageError."""
        self._execute(self.machine.start(self._clock.now()))

    def receive(self, site: str, payload: bytes) -> None:
        """Handle one message of a site; a refused one changes nothing but the audit log."""
        try:
            effects = self.machine.handle(site, payload, self._clock.now())
        except ProtocolError as error:
            fields = {"site": error.culprit or site, "code": error.code.label}
            self._evidence.record("peer.refused", fields)
            self._observer.refused(site, error.code)
            return
        self._execute(effects)

    def tick(self) -> None:
        """Act on the time. Raises AbortedRound where the machine's patience is at its end."""
        self._execute(self.machine.tick(self._clock.now()))

    def _execute(self, effects: list[Effect]) -> None:
        """Carry the effects out and use them up: what one held is gone before the next."""
        if any(isinstance(effect, SendEach | PutBlob) for effect in effects):
            self._tidy()
        effects.reverse()
        while effects:
            self._one(effects.pop())

    def _one(self, effect: Effect) -> None:
        match effect:
            case Persist():
                self._journal.store(effect.record)
            case PutBlob():
                self._journal.put_blob(effect.name, effect.parts)
            case DropBlob():
                self._journal.drop_blob(effect.name)
            case SendTo():
                self._transport.send(effect.site, effect.payload)
            case SendEach():
                for site, payload in effect.messages():
                    self._transport.send(site, payload)
            case Note():
                self._evidence.record(effect.event, effect.fields)
            case Completed():
                self._observer.completed(effect, self.machine.chain)
            case Aborted():
                self._observer.aborted(effect)
            case RunOver():
                self._observer.over(effect.chain)


def deadlines_of(study: Study) -> Deadlines:
    """How long the coordinator waits in each phase, by the signed study."""
    limits = study.deadlines
    return Deadlines(
        handshake=limits.handshake_s,
        train=limits.train_s,
        upload=limits.upload_s,
        agree=limits.agree_s,
        unmask=limits.unmask_s,
    )
