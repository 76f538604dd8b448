"""How many hospitals must agree before anything is revealed.

With n parties of whom c may collude with the coordinator, the quorum is

    Q = max(floor((n + c) / 2) + 1, c + 2).

**One release.** floor(x) + 1 > x, so 2Q > n + c. A release needs Q signatures. Two different
releases in one round would need 2Q signatures, of which the colluders give at most 2c; the
other 2Q - 2c come from the n - c honest parties, who sign once each: 2Q - 2c <= n - c, that is
2Q <= n + c. Contradiction: at most one release per round.

**Never one hospital alone.** Q - c >= 2, so at least two honest hospitals are in every sum
that is released, and colluders who subtract their own updates are left with a sum of two.
"""

from __future__ import annotations

from typing import Final

MIN_PARTIES: Final = 3


def colluders(parties: int) -> int:
    """How many colluding parties to withstand where the study does not say: max(1, n // 3)."""
    _check_parties(parties)
    return max(1, parties // 3)


def quorum(parties: int, colluders: int) -> int:
    """The least quorum that withstands `colluders` of `parties` and an active coordinator.

    Raises:
        ValueError: fewer than 3 parties, no colluder assumed (every hospital can subtract
            its own update), or so many that no quorum of `parties` withstands them.
    """
    _check_parties(parties)
    if colluders < 1:
        raise ValueError("at least one party is assumed to collude")
    needed = max((parties + colluders) // 2 + 1, colluders + 2)
    if needed > parties:
        raise ValueError(f"{parties} parties cannot withstand {colluders} colluders")
    return needed


def tolerates(parties: int, quorum: int) -> int:
    """How many parties may drop out of a round that still completes."""
    _check_parties(parties)
    if not MIN_PARTIES <= quorum <= parties:
        raise ValueError(f"quorum {quorum} is not within {MIN_PARTIES}..{parties}")
    return parties - quorum


def _check_parties(parties: int) -> None:
    if parties < MIN_PARTIES:
        raise ValueError(f"a study has at least {MIN_PARTIES} parties, not {parties}")
