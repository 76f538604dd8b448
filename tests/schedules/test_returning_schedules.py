"""Where every site comes back in the end, no round is lost and the run always finishes."""

import pytest
from schedule import play

CHUNK = 25


@pytest.mark.parametrize("first", range(10_000, 10_500, CHUNK))
def test_a_run_whose_sites_return_always_finishes(first):
    for seed in range(first, first + CHUNK):
        world = play(seed, returning=True)
        assert world.final is not None, f"seed {seed}: {world.waits}"


@pytest.mark.parametrize("first", range(20_000, 20_100, CHUNK))
def test_without_noise_no_model_is_tried_twice_unproven_and_the_run_still_finishes(first):
    for seed in range(first, first + CHUNK):
        world = play(seed, returning=True, private=False)
        assert world.final is not None, f"seed {seed}: {world.waits}"


# Seeds that found a fault in the protocol code once, by the fault they found.
PINNED = {
    "a late hospital's ratchet stood elsewhere than the others'": (0, 8, 13, 25, 39, 43, 54, 70),
    "a hospital that came after the last round never got the model": (29, 66, 72, 73),
    "rounds were burned while hospitals were missed, until none was left": (
        1,
        59,
        82,
        96,
        173,
        416,
        471,
    ),
    "a hospital that had missed the handshake could not help to burn": (6, 19, 44, 53, 62, 68),
    "one damaged opening bound a hospital to a run that did not exist": (35,),
}


@pytest.mark.parametrize("fault", PINNED)
def test_a_seed_that_failed_once_stays_solved(fault):
    for seed in PINNED[fault]:
        assert play(seed, returning=True).final is not None, seed
        play(seed)
