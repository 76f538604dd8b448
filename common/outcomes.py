"""What a model predicts: one of several classes, several labels, a number, or a time to an event.

Everything that depends on the kind of answer, and on nothing else of a task, follows from its
outcome: how many numbers the network gives (here), the loss (client/tasks/losses.py), and what is
measured (common/metrics.py). No numpy: checking a study reads this.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Classes", "Hazard", "LabelSet", "Number", "Outcome"]


@dataclass(frozen=True, slots=True)
class Classes:
    """Exactly one of `labels`: a softmax over L outputs."""

    labels: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for a row."""
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Any of `labels`, each for itself: a sigmoid for each of L outputs.

    `squared`: trained on the squared error of the probabilities, not on their cross-entropy.
    """

    labels: tuple[str, ...]
    squared: bool = False

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for a row."""
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Number:
    """A quantity between public bounds; the network's one output is its place between them.

    Values beyond a bound, measured or predicted, are read as the bound.
    """

    low: float
    high: float
    unit: str = ""

    labels: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for a row."""
        return 1


@dataclass(frozen=True, slots=True)
class Hazard:
    """A time to an event in intervals: a logit of the event in each, given that none came before.

    `edges` are the ends of the intervals, rising, in the unit of the data; the last interval has
    no end. Source: Gensheimer and Narasimhan 2019 (discrete-time survival).
    """

    edges: tuple[float, ...]

    labels: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for a row: one for each interval."""
        return len(self.edges) + 1


Outcome = Classes | LabelSet | Number | Hazard
