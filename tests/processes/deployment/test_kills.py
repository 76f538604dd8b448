"""kill -9 of everybody at random moments: no round is lost, nothing is paid for twice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from federation import COORDINATOR, Federation, ended, replayed, require_whole
from kills import kill_at_random

from common.tensors import state_digest

ROUNDS = 8


@pytest.fixture(scope="module")
def undisturbed(zygote, tmp_path_factory):
    """The final model of a run that nothing disturbs."""
    with Federation(tmp_path_factory.mktemp("undisturbed"), rounds=ROUNDS, zygote=zygote) as fed:
        fed.start()
        told = ended(fed)
        require_whole(fed)
        assert told["rounds_aborted"] == 0
        assert {len(names) for names in fed.survivors().values()} == {4}
        assert state_digest(replayed(fed)) == state_digest(fed.model())
        return fed.model()


@pytest.mark.parametrize("seed", [1, 2])
def test_after_kills_of_the_coordinator_the_model_is_bit_identical(federation, undisturbed, seed):
    fed = federation(rounds=ROUNDS)
    fed.start()
    stream = np.random.default_rng(seed)
    kills = kill_at_random(fed, stream, kills=5, victims=[COORDINATOR])
    told = ended(fed)
    assert len(kills) >= 3
    require_whole(fed)
    assert told["rounds_aborted"] == 0
    assert {len(names) for names in fed.survivors().values()} == {4}
    assert state_digest(fed.model()) == state_digest(undisturbed)


def test_another_seed_gives_another_model(federation, undisturbed):
    """The control: the comparison above can fail."""
    fed = federation(rounds=ROUNDS, seed=2)
    fed.start()
    ended(fed)
    require_whole(fed)
    assert state_digest(fed.model()) != state_digest(undisturbed)


@pytest.mark.parametrize("seed", [3, 4])
def test_after_kills_of_hospitals_the_model_is_the_replay_of_the_survivors(federation, seed):
    # The kills land in training as well.
    fed = federation(rounds=ROUNDS, options={"train_s": 0.3})
    fed.start()
    stream = np.random.default_rng(seed)
    kills = kill_at_random(fed, stream, kills=6, victims=fed.sites)
    ended(fed)
    assert len(kills) >= 4
    require_whole(fed)
    assert state_digest(replayed(fed)) == state_digest(fed.model())


def missing(fed, site):
    """The completed rounds that a hospital was not summed in."""
    return {number for number, names in fed.survivors().items() if site not in names}


def test_a_hospital_killed_while_it_trains_is_missing_in_that_round_alone(federation):
    fed = federation(rounds=5, options={"train_s": 0.8})
    fed.start()
    site, *others = fed.sites
    fed.until(lambda: 2 in fed.ledger(site).attempts, 60, "the charge of round 2")
    fed.until(lambda: fed.trains(site) == 2, 10, "training")
    fed.kill(site)
    assert fed.trains(site) == 2, "killed in training, not before and not after"
    assert fed.completed() == 1
    fed.start(site)
    told = ended(fed)
    require_whole(fed)
    assert told["rounds_aborted"] == 0
    assert missing(fed, site) == {2}
    assert {3, 4, 5} <= set(fed.ledger(site).attempts)
    assert all(missing(fed, other) == set() for other in others)
    assert fed.ledger(site).attempts[2] == 1, "paid for once, though nothing came of it"
    model = state_digest(fed.model())
    assert state_digest(replayed(fed)) == model
    # The control of the replay: with the lost update, the model would be another.
    full = dict.fromkeys(fed.survivors(), fed.sites)
    assert state_digest(replayed(fed, survivors=full)) != model


def test_after_kills_of_everybody_the_run_is_whole(federation):
    fed = federation(rounds=10)
    fed.start()
    stream = np.random.default_rng(5)
    victims = [COORDINATOR, COORDINATOR, *fed.sites]
    kills = kill_at_random(fed, stream, kills=9, victims=victims, down_s=0.3)
    ended(fed)
    assert len(kills) >= 6
    require_whole(fed)
    assert state_digest(replayed(fed)) == state_digest(fed.model())


def test_a_journal_that_was_rolled_back_pays_twice_and_the_check_sees_it(federation):
    """The control of `double_spent`: the journal is what keeps a round from being paid twice."""
    fed = federation(rounds=3, options={"train_s": 1.0})
    fed.start()
    site = fed.sites[0]
    journal = fed.study_folder(site).journal
    kept = fed.root / "kept"
    fed.until(lambda: 1 in fed.ledger(site).attempts, 30, "the charge of round 1")
    shutil.copytree(journal, kept)
    fed.until(lambda: 2 in fed.ledger(site).attempts, 30, "the charge of round 2")
    fed.kill(site)
    shutil.rmtree(journal)
    shutil.copytree(kept, journal)
    fed.start(site)
    fed.until(lambda: fed.ledger(site).double_spent > 0, 60, "a second charge of a round")
