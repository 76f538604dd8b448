"""Executes a hospital's effects in order: durable first, then sent. The only loop of the site.

The driver is crash-only: a StorageError leaves it unusable, and the next start goes on from
the journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from client.round.effects import Effect, Final, Release, Send, SendBlob, Work, Worked
from client.round.machine import SiteRound
from common.errors import Code, DataError, ProtocolError, RefusedError, WardroundError
from common.evidence import Evidence
from common.ports import Journal, Transport
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.transcript import Chain

COORDINATOR = "coordinator"


class Worker(Protocol):
    """What a round machine asks of the hospital's own systems."""

    def work(self, request: Work) -> Worked:
        """Check approval, reserve the budget, train, measure.

        Raises RefusedError or DataError where the hospital will not or cannot.
        """
        ...

    def release(self, round_number: int) -> None:
        """Record in the ledger that the round's update is about to leave."""
        ...

    def stopped(self) -> bool:
        """Whether the hospital's kill switch is set."""
        ...

    def finished(self, chain: Chain) -> None:
        """Keep the run's final model."""
        ...


class SiteDaemon:
    """One hospital's running process: a machine and the world it acts on."""

    def __init__(
        self,
        machine: SiteRound,
        *,
        journal: Journal,
        transport: Transport,
        worker: Worker,
        evidence: Evidence,
    ) -> None:
        self._machine = machine
        self._journal = journal
        self._transport = transport
        self._worker = worker
        self._evidence = evidence

    def start(self) -> None:
        """Say hello."""
        self._execute(self._machine.hello())

    def receive(self, payload: bytes) -> None:
        """Handle one message of the coordinator. Raises StorageError only."""
        try:
            effects = self._machine.handle(payload)
        except ProtocolError as error:
            effects = self._refused(error)
        except DataError as error:  # an update that is not finite: this round goes on without us
            own = Note("round.declined", {"code": error.code.label})
            effects = [own, *self._machine.refusal(told(error), None)]
        self._execute(effects)

    def _refused(self, error: ProtocolError) -> list[Effect]:
        ended: list[Effect] = []
        if error.code is Code.LEDGER_ROLLBACK and error.culprit is None:
            ended = self._machine.end(error.code)
        return [*ended, *self._machine.refusal(error.code, error.culprit)]

    def _execute(self, effects: Sequence[Effect]) -> None:
        pending = list(effects)
        while pending:
            pending = [*self._one(pending[0]), *pending[1:]]

    def _one(self, effect: Effect) -> list[Effect]:
        match effect:
            case Persist():
                self._journal.store(effect.record)
            case PutBlob():
                # A kept upload that a power cut takes away costs a repeat, not a secret.
                self._journal.put_blob(effect.name, effect.parts, durable=False)
            case DropBlob():
                self._journal.drop_blob(effect.name)
            case Send():
                self._send(effect.payload)
            case SendBlob():
                kept = self._journal.get_blob(effect.name)
                if kept is not None:
                    self._send(kept)
            case Work():
                return self._work(effect)
            case Release():
                self._worker.release(effect.round)
            case Note():
                self._evidence.record(effect.event, effect.fields)
            case Final():
                self._worker.finished(effect.chain)
        return []

    def _send(self, payload: bytes) -> None:
        # The kill switch is looked at before every single send.
        if not self._worker.stopped():
            self._transport.send(COORDINATOR, payload)

    def _work(self, request: Work) -> list[Effect]:
        try:
            result = self._worker.work(request)
        except (RefusedError, DataError) as error:
            return self._declined(request, error)
        return self._machine.worked(request.round, result)

    def _declined(self, request: Work, error: WardroundError) -> list[Effect]:
        """Sit the round out; the reason itself stays in the hospital's own audit log."""
        own = Note("round.declined", {"code": error.code.label, "round": request.round})
        return [
            *self._machine.decline(request.round),
            own,
            *self._machine.refusal(told(error), None),
        ]


def told(error: WardroundError) -> Code:
    """What the coordinator learns: what is wrong with the records never leaves, even as a code."""
    return Code.DATA_DECLINED if isinstance(error, DataError) else error.code
