"""Writes what becomes of every round into the history, in a simulation and in a deployment."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import Code
from common.metrics import Metrics, scoring_of
from common.protocol.terms import Terms
from common.study import Study
from server.history import History
from server.report import RoundResult
from server.round.effects import Aborted, Completed
from server.round.machine import CoordinatorRound

__all__ = ["Keeper"]


class Keeper:
    """Keeps rounds and what they measured.

    Args:
        history: the file.
        study, terms: what the run is about.
        now: monotonic seconds. sent: bytes received of all sites so far.
        epsilon: the largest that any site has reserved, where one user may know it.
    """

    def __init__(
        self,
        history: History,
        study: Study,
        terms: Terms,
        *,
        now: Callable[[], float],
        sent: Callable[[], int],
        epsilon: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.history = history
        self._study, self._terms = study, terms
        self._now, self._sent, self._epsilon = now, sent, epsilon
        self._began, self._before = now(), sent()

    def completed(self, result: Completed) -> tuple[RoundResult, Metrics | None] | None:
        """Keep a round that ended in an aggregate; None where it is known.

        The metrics go first: a round that is known has told what it measured.
        """
        if self.history.knows(result.round):
            return None
        now, sent = self._now(), self._sent()
        seconds, up = now - self._began, sent - self._before
        self._began, self._before = now, sent
        metrics = self._measured(result)
        entry = RoundResult(
            round=result.round,
            turn=result.turn,
            kind=result.kind,
            cohort=len(self._terms.parties),
            survivors=len(result.survivors),
            dropouts=tuple(v for v in self._terms.parties if v not in result.survivors),
            metrics=None,
            epsilon=self._epsilon(),
            bytes_up=up,
            seconds=seconds,
        )
        self.history.add(entry)
        return entry, metrics

    def _measured(self, result: Completed) -> Metrics | None:
        if result.metrics is None:
            return None
        metrics = scoring_of(self._study).read(result.metrics)
        # A round measures the model that it starts from: the one of the turn before.
        self.history.measured(result.turn - 1, metrics, rejected=result.rejected)
        return metrics

    def aborted(self, result: Aborted, turn: int) -> None:
        """Keep a round that ended without an aggregate, in this turn."""
        self.history.add(
            RoundResult(
                round=result.round,
                turn=turn,
                kind=self._terms.kind(turn),
                cohort=len(self._terms.parties),
                survivors=0,
                dropouts=result.missing,
                metrics=None,
                epsilon=None,
                bytes_up=0,
                seconds=0.0,
                code=result.code.label,
            )
        )


def lost(machine: CoordinatorRound, history: History) -> Aborted | None:
    """The round that a crash kept from being told as aborted; None where there is none."""
    seen = machine.record
    over = machine.ended is not None and seen.round > seen.version
    if not (machine.phase == "burn" or over) or history.knows(seen.round):
        return None
    return Aborted(seen.round, Code.QUORUM_LOST, "burn", machine.waiting_for())
