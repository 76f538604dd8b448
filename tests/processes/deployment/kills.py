"""Kills at random moments, and what each of them cost: for the tests and for the benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from federation import COORDINATOR, Federation


@dataclass(frozen=True)
class Kill:
    """One kill -9.

    Attributes:
        victim: who.
        round, phase: where the run stood, as the coordinator last wrote.
        down_s: how long the victim stayed away.
        back_s: from its new start until it took part again: a hospital, until the coordinator
            took its answer; the coordinator, until hospitals enough for a quorum were heard.
    """

    victim: str
    round: int
    phase: str
    down_s: float
    back_s: float | None


def _heard(fed: Federation, victim: str, since: int) -> Callable[[], bool]:
    """Whether the victim takes part again, by what the coordinator logged since."""
    wanted = fed.bundle.study.quorum_size(len(fed.sites)) if victim == COORDINATOR else 1

    def found() -> bool:
        told = [e for e in fed.log()[since:] if e.get("event") == "site.online"]
        names = {e["site"] for e in told if victim in {COORDINATOR, e["site"]}}
        return len(names) >= wanted

    return found


def kill_at_random(
    fed: Federation,
    stream: np.random.Generator,
    *,
    kills: int,
    victims: Sequence[str],
    between_s: float = 1.2,
    down_s: float = 0.6,
    seconds: float = 60,
) -> list[Kill]:
    """Kill somebody, let it come back, wait a random time, again; ends early with the run."""
    found: list[Kill] = []
    while len(found) < kills:
        time.sleep(stream.uniform(0, between_s))
        if not fed.alive(COORDINATOR):
            return found
        victim = str(stream.choice(list(victims)))
        status = fed.status()
        fed.kill(victim)
        down = stream.uniform(0, down_s)
        time.sleep(down)
        since, start = len(fed.log()), time.monotonic()
        fed.start(victim)
        heard = _heard(fed, victim, since)
        back: float | None = None
        while time.monotonic() - start < seconds:
            if heard():
                back = time.monotonic() - start
                break
            if not fed.alive(COORDINATOR):
                break  # the run ended meanwhile
            time.sleep(0.02)
        else:
            raise AssertionError(f"{victim} is not back within {seconds} s\n{fed.where()}")
        phase = status.get("phase", "")
        found.append(Kill(victim, status.get("round", 0), phase, down, back))
    return found
