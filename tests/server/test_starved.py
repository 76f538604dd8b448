"""A simulation whose hospitals will not do a round's work stops at once and says why."""

from __future__ import annotations

import pytest

from client.training import LocalTrainer
from common.errors import Code, DataError

PLAIN = {
    "training": {"rounds": 1},
    "privacy": {"mode": "none", "epsilon": None, "delta": None, "clip_norm": None},
}
MESSAGE = "the local update is not finite."


@pytest.fixture
def failing(monkeypatch):
    """Lets the training of the first `count` hospitals that train fail."""

    def fail(count: int) -> set[int]:
        plain, broken = LocalTrainer.train, set()

        def train(self, state, round_number):
            if len(broken) < count:
                broken.add(id(self))
            if id(self) in broken:
                raise DataError(Code.UPDATE_NOT_FINITE, MESSAGE)
            return plain(self, state, round_number)

        monkeypatch.setattr(LocalTrainer, "train", train)
        return broken

    return fail


def test_a_run_that_too_many_hospitals_decline_ends_starved_with_their_names_and_reason(
    make_study, wardround, tmp_path, failing
):
    study = make_study(PLAIN)
    broken = failing(3)
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "out")
    assert len(broken) == 3
    assert (status, problems[:7]) == (6, Code.RUN_STARVED.label)
    assert MESSAGE in problems
    assert Code.DATA_DECLINED.label in problems
    assert sum(name in problems for name in ("east", "north", "south", "west")) == 3
    assert "Lower the learning rate" in problems, "the fix is the fault's own"
    assert "Traceback" not in told + problems


def test_control_the_same_run_goes_on_without_one_of_them(make_study, wardround, tmp_path, failing):
    study = make_study(PLAIN)
    broken = failing(1)
    status, _, problems = wardround("simulate", study, "--out", tmp_path / "out")
    assert len(broken) == 1
    assert status == 0, problems
