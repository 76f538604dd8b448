"""The one table a person watches while a run goes on; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = [
    "LiveTable",
    "PlainLines",
    "Rollbacks",
    "RoundSummary",
    "RunView",
    "Silent",
    "amount",
    "duration",
    "epsilon_range",
    "time_left",
]

_SHOWN_ROUNDS = 14
_RECENT = 5
_NAMES_SHOWN = 3
_SHORT_NAME = 12
_NOTES_SHOWN = 3
_WIDE = 96
_KIND = {"evaluate": "final evaluation", "statistics": "statistics of numeric features"}
_SHORT_KIND = {"evaluate": "final", "statistics": "stats"}
_QUALITY = slice(4, 6)  # loss and score in a row of the table


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One completed round, for people.

    Units:
        round: the training round; an evaluation carries the last one's. epsilon: (spent, cap)
        by site, empty without privacy. bytes_up: of all sites together.
    """

    round: int
    kind: str
    cohort: tuple[str, ...]
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    quorum: int
    epsilon: Mapping[str, tuple[float, float]]
    bytes_up: int
    seconds: float


class Rollbacks:
    """Counts the models that the acceptance gate rolled back one after the other.

    After a rollback the standing model is measured again in its successor's place: that is no
    new model, and ends no row.
    """

    def __init__(self) -> None:
        self.row = 0
        self._last = -2

    def measured(self, number: int, *, rejected: bool) -> None:
        """The model after training round `number` was measured, and the gate judged it."""
        if rejected:
            self.row += 1
            self._last = number
        elif number != self._last + 1:
            self.row = 0


class RunView:
    """Where a run shows itself; a view overrides what it has something to say about.

    `live` views want to be told every phase: `round_started` and `phase` show something.
    """

    live = False

    def note(self, text: str) -> None:
        """What goes on outside of rounds, in a few words."""

    def round_started(self, number: int, kind: str, cohort: Sequence[str], quorum: int) -> None:
        """A round begins."""

    def phase(self, name: str, done: int, total: int, waiting_for: Sequence[str] = ()) -> None:
        """`done` of `total` sites have finished the phase `name` of the current round."""

    def round_completed(self, summary: RoundSummary) -> None:
        """A round ended with an aggregate."""

    def measured(
        self,
        number: int,
        loss: float | None,
        score: float | None,
        *,
        noise: float | None,
        rejected: bool = False,
    ) -> None:
        """The model after training round `number`; `noise` is the score's, from privacy.

        It is told with the round that comes next, because that is where the model is measured.
        Number 0 is the initial model; a `rejected` one was rolled back by the acceptance gate.
        """

    def round_aborted(
        self, number: int, kind: str, reason: str, waiting_for: Sequence[str] = ()
    ) -> None:
        """A round ended without an aggregate; `reason` is one line, for people."""

    def finish(self, verdict: str) -> None:
        """The run is over; `verdict` is its last line."""

    def close(self) -> None:
        """Give the terminal back, after an error too."""


class Silent(RunView):
    """Shows nothing: for tests, `--json` and embedding."""


class PlainLines(RunView):
    """One line for each round, for logs and pipes.

    Args:
        stream: where the lines go.
        rounds: how many rounds the run is to have, for the time left.
        score: what models are compared by, in words.
    """

    def __init__(self, stream: TextIO, *, rounds: int, score: str = "accuracy") -> None:
        self._stream = stream
        self._score = score
        self._rounds = rounds
        self._seconds: list[float] = []
        self._rollbacks = Rollbacks()

    def note(self, text: str) -> None:
        """A line."""
        self._line(f"  {text} ...")

    def round_completed(self, summary: RoundSummary) -> None:
        """The round's line."""
        self._seconds.append(summary.seconds)
        parts = [
            _headed(summary.round, summary.kind, self._rounds),
            f"cohort {len(summary.cohort)}",
            f"survivors {len(summary.survivors)}{_lost(summary.dropouts)}",
            f"quorum {summary.quorum}",
        ]
        if summary.epsilon:
            parts.append(f"epsilon {epsilon_range(summary.epsilon)}")
        parts.append(f"up {amount(summary.bytes_up)}")
        left = time_left(self._seconds, self._rounds - summary.round)
        parts.append(f"{duration(summary.seconds)}, left {left}")
        self._line("  ".join(parts))

    def measured(
        self,
        number: int,
        loss: float | None,
        score: float | None,
        *,
        noise: float | None,
        rejected: bool = False,
    ) -> None:
        """A line of its own."""
        self._rollbacks.measured(number, rejected=rejected)
        told = [
            f"{name} {value:.3f}"
            for name, value in (("loss", loss), (self._score, score))
            if value is not None
        ]
        if told:
            back = f"  rolled back{_in_a_row(self._rollbacks)}" if rejected else ""
            noised = _noised(self._score, noise)
            self._line(f"  model after round {number}: {'  '.join(told)}{noised}{back}")

    def round_aborted(
        self, number: int, kind: str, reason: str, waiting_for: Sequence[str] = ()
    ) -> None:
        """The round's line, with what it waited for."""
        waited = f"; waited for {_names(waiting_for)}" if waiting_for else ""
        self._line(f"{_headed(number, kind, self._rounds)}  aborted: {reason}{waited}")

    def finish(self, verdict: str) -> None:
        """The verdict."""
        if verdict:
            self._line(verdict)

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


@dataclass(frozen=True, slots=True)
class _Phase:
    number: int
    kind: str
    cohort: int
    quorum: int
    name: str = "starting"
    done: int = 0
    total: int = 0
    waiting_for: tuple[str, ...] = ()


class LiveTable(RunView):
    """The live table (rich). It redraws when something happened; no thread, no clock.

    Args:
        console: the terminal, as a rich console.
        title: what runs.
        rounds: how many rounds the run is to have.
        score: what models are compared by, in words.
    """

    live = True

    def __init__(
        self, console: Console, *, title: str, rounds: int, score: str = "accuracy"
    ) -> None:
        from rich.live import Live

        self._score = score
        self._title = title
        self._rounds = rounds
        self._rows: list[tuple[str, ...]] = []
        self._notes: list[str] = []
        self._seconds: list[float] = []
        self._phase: _Phase | None = None
        self._note = ""
        self._quality_note = ""
        self._rollbacks = Rollbacks()
        self._console = console
        self._live: Live = Live(console=console, auto_refresh=False, transient=False)
        self._started = False

    def note(self, text: str) -> None:
        """Show it under the table until something else goes on."""
        self._phase, self._note = None, f"{text} ..."
        self._draw()

    def round_started(self, number: int, kind: str, cohort: Sequence[str], quorum: int) -> None:
        """Show the round as running."""
        self._phase = _Phase(number, kind, len(cohort), quorum)
        self._draw()

    def phase(self, name: str, done: int, total: int, waiting_for: Sequence[str] = ()) -> None:
        """Show how far the running round is."""
        now = self._phase
        if now is not None:
            self._phase = _Phase(
                now.number, now.kind, now.cohort, now.quorum, name, done, total, tuple(waiting_for)
            )
            self._draw()

    def round_completed(self, summary: RoundSummary) -> None:
        """Add the round's row."""
        self._seconds.append(summary.seconds)
        self._phase = None
        self._rows.append(
            (
                _number(summary.round, summary.kind),
                str(len(summary.cohort)),
                f"{len(summary.survivors)}{_short_lost(summary.dropouts)}",
                str(summary.quorum),
                "",
                "",
                epsilon_range(summary.epsilon),
                amount(summary.bytes_up),
                time_left(self._seconds, self._rounds - summary.round),
            )
        )
        if summary.dropouts and summary.dropouts[0] not in _short_lost(summary.dropouts):
            self._notes.append(
                f"{_named(summary.round, summary.kind)}: lost {_names(summary.dropouts)}"
            )
        self._draw()

    def measured(
        self,
        number: int,
        loss: float | None,
        score: float | None,
        *,
        noise: float | None,
        rejected: bool = False,
    ) -> None:
        """Fill the numbers into the row of the round that made the model."""
        cells = tuple("" if value is None else f"{value:.3f}" for value in (loss, score))
        for at in range(len(self._rows) - 1, -1, -1):
            row = self._rows[at]
            if row[0] == str(number) and len(row) > _QUALITY.stop:
                self._rows[at] = (*row[: _QUALITY.start], *cells, *row[_QUALITY.stop :])
                break
        self._quality_note = _noised(self._score, noise).strip()
        self._rollbacks.measured(number, rejected=rejected)
        if rejected:
            often = _in_a_row(self._rollbacks)
            self._notes.append(f"the model of round {number} was rolled back: it got worse{often}")
        self._draw()

    def round_aborted(
        self, number: int, kind: str, reason: str, waiting_for: Sequence[str] = ()
    ) -> None:
        """Add an empty row, and a note under the table that says why."""
        self._phase = None
        waited = f"; waited for {_names(waiting_for)}" if waiting_for else ""
        self._rows.append((_number(number, kind), "", "aborted"))
        self._notes.append(f"{_named(number, kind)} aborted: {reason}{waited}")
        self._draw()

    def finish(self, verdict: str) -> None:
        """Leave the table on the screen and write the verdict under it."""
        self._phase, self._note = None, ""
        if self._started:
            self._draw()
            self._live.stop()
        if verdict:
            self._console.print(verdict, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back, after an error too."""
        if self._started:
            self._live.stop()

    def _draw(self) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            title=Text(self._title),
            title_justify="left",
            padding=(0, 1 if self._console.width >= _WIDE else 0, 0, 0),
            pad_edge=False,
        )
        for name in ("round", "cohort", "survivors", "quorum", "loss", self._score):
            side: Literal["left", "right"] = "left" if name == "survivors" else "right"
            table.add_column(name, justify=side, no_wrap=True)
        for name in ("ε of cap", "bytes up", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        hidden = max(0, len(self._rows) - _SHOWN_ROUNDS)
        if hidden:
            table.add_row("", "", Text(f"{hidden} earlier", style="dim"))
        for row in self._rows[hidden:]:
            style = "yellow" if row[2] == "aborted" else ""
            table.add_row(*(Text(cell, style=style) for cell in row))
        notes = [Text(note, style="yellow") for note in self._notes[-_NOTES_SHOWN:]]
        if self._quality_note:
            notes.insert(0, Text(self._quality_note, style="dim"))
        return Group(table, *notes, Text(self._status(), style="dim"))

    def _status(self) -> str:
        now = self._phase
        if now is None:
            return self._note
        of = f" of {self._rounds}" if now.kind == "train" else ""
        text = f"{_named(now.number, now.kind)}{of}: {now.name}"
        if now.total:
            text += f" {now.done} of {now.total}"
        if now.waiting_for:
            text += f", waiting for {_names(now.waiting_for)}"
        return text


# ------------------------------------------------------------------------- small phrases


def epsilon_range(epsilon: Mapping[str, tuple[float, float]]) -> str:
    """Spent of cap: one pair where all sites agree, else least and most; empty without privacy."""
    if not epsilon:
        return ""
    spent = [pair[0] for pair in epsilon.values()]
    caps = {f"{pair[1]:g}" for pair in epsilon.values()}
    low, high = f"{min(spent):.2f}", f"{max(spent):.2f}"
    cap = caps.pop() if len(caps) == 1 else f"{min(p[1] for p in epsilon.values()):g}+"
    return f"{high} of {cap}" if low == high else f"{low}-{high} of {cap}"


def time_left(seconds: Sequence[float], rounds: int) -> str:
    """How long the remaining rounds will take, by the median of the last five."""
    if rounds <= 0:
        return "done"
    if not seconds:
        return "?"
    recent = sorted(seconds[-_RECENT:])
    return duration(recent[len(recent) // 2] * rounds)


def duration(seconds: float) -> str:
    """Seconds as `0.8 s`, `42 s`, `3 min` or `2.5 h`."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    if seconds < 99.5:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"  # noqa: PLR2004


def amount(count: float) -> str:
    """Bytes as `512 B`, `5.8 kB`, `116 MB`: decimal units."""
    if count < 1000:  # noqa: PLR2004
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":  # noqa: PLR2004
            break
    return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"  # noqa: PLR2004


def _number(number: int, kind: str) -> str:
    """A round in the first column: its number, or what it is where it does not train."""
    return str(number) if kind == "train" else _SHORT_KIND.get(kind, kind)


def _named(number: int, kind: str) -> str:
    return f"round {number}" if kind == "train" else _KIND.get(kind, kind)


def _headed(number: int, kind: str, rounds: int) -> str:
    return f"round {number}/{rounds}" if kind == "train" else _KIND.get(kind, kind)


def _noised(score: str, noise: float | None) -> str:
    return f"  (privacy noise on the {score}: about ±{noise:.2f})" if noise else ""


def _in_a_row(rollbacks: Rollbacks) -> str:
    return f" ({rollbacks.row} in a row)" if rollbacks.row > 1 else ""


def _lost(dropouts: Sequence[str]) -> str:
    return f" (lost {_names(dropouts)})" if dropouts else ""


def _short_lost(dropouts: Sequence[str]) -> str:
    """The dropouts in a narrow column: one by name, more by number."""
    if len(dropouts) == 1 and len(dropouts[0]) <= _SHORT_NAME:
        return f" -{dropouts[0]}"
    return f" -{len(dropouts)}" if dropouts else ""


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
