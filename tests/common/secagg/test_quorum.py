from __future__ import annotations

import itertools

import pytest

from common.secagg.quorum import colluders, quorum, tolerates

PAIRS = [(n, c) for n in range(3, 101) for c in range(1, n - 1)]


def test_a_quorum_is_the_least_with_one_release_and_two_honest_members():
    for n, c in PAIRS:
        q = quorum(n, c)
        assert c + 2 <= q <= n
        assert 2 * q > n + c
        assert 2 * (q - 1) <= n + c or q - 1 < c + 2


def test_two_quorums_always_share_an_honest_party_and_one_less_need_not():
    """By enumeration: colluders sign both sides, every honest party signs once."""

    def two_releases(n: int, c: int, q: int) -> bool:
        honest = range(n - c)
        needed = max(0, q - c)
        return any(
            len(set(honest) - set(first)) >= needed
            for first in itertools.combinations(honest, min(needed, n - c))
        )

    for n, c in [(n, c) for n, c in PAIRS if n <= 9]:
        q = quorum(n, c)
        assert not two_releases(n, c, q)
        if q > c + 2:  # the control: where the first bound decides, one less admits two
            assert two_releases(n, c, q - 1)


@pytest.mark.parametrize(
    ("n", "c", "q", "drops"),
    [(3, 1, 3, 0), (4, 1, 3, 1), (5, 1, 4, 1), (10, 3, 7, 3), (30, 10, 21, 9), (100, 33, 67, 33)],
)
def test_the_published_table(n, c, q, drops):
    assert colluders(n) == c
    assert quorum(n, c) == q
    assert tolerates(n, q) == drops


@pytest.mark.parametrize(("n", "c"), [(2, 1), (0, 1), (3, 0), (3, -1), (3, 2), (10, 9)])
def test_what_no_quorum_withstands_is_refused(n, c):
    with pytest.raises(ValueError, match=r"part(y|ies)"):
        quorum(n, c)


@pytest.mark.parametrize(("n", "q"), [(5, 2), (5, 6), (2, 2)])
def test_a_quorum_outside_the_parties_tolerates_nothing(n, q):
    with pytest.raises(ValueError, match=r"quorum|parties"):
        tolerates(n, q)
