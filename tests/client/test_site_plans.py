"""A joint study at a hospital: reserved whole, drawn round by round, settled when it is over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.budget import LedgerLine, budget_report, forecast_study, privacy_statement
from client.config import Ceilings
from client.privacy.ledger import Charge, Ledger
from client.round.effects import Work
from client.site import HospitalWorker, SiteSetup, open_ledger, plan_charges
from common.accountant import DpEvent, epsilon
from common.bundle import Bundle
from common.errors import Code, DataError, RefusedError
from common.protocol.transcript import Chain
from common.study import Study
from common.world import SeededEntropy

SIGMA, RATE, NOISE, DELTA = 2.0, 0.1, 30.0, 1e-5
CHAIN = Chain(0, 1, {}, bytes(32), (), bytes(32))


class Trainer:
    """Gives zeros, or what it is told to raise; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fault: Exception | None = None

    def _zeros(self, what, kind=np.int64):
        self.asked.append(what)
        if self.fault is not None:
            raise self.fault
        return np.zeros(1, kind)

    def train(self, state, number):
        return self._zeros("train", np.int32)

    def measure(self, state, number):
        return self._zeros("measure")

    def statistics(self):
        return self._zeros("statistics")


@pytest.fixture
def bundle(study_of):
    study = study_of("package:nothing/model").model_dump()
    study["training"] |= {
        "rounds": 4,
        "local_steps": 1,
        "sampling_rate": RATE,
        "spare_rounds": 2,
    }
    study["evaluation"] |= {"every": 2}
    study["privacy"] = {"mode": "joint", "epsilon": 3.0, "delta": DELTA, "clip_norm": 1.0}
    study["quorum"] = {"colluders": 1}
    study["sites"] = tuple({"id": f"site-{i}"} for i in range(5))
    return Bundle(Study.model_validate(study), {}, bytes(32), "{}", SIGMA, NOISE)


class Hospital:
    """One hospital's worker and ledger; `restart` forgets all but the file."""

    def __init__(self, bundle, folder) -> None:
        self.bundle, self.folder, self.trainer = bundle, folder, Trainer()
        self.faulty: Exception | None = None
        self.ledger: Ledger | None = None
        self.restart()

    def restart(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = open_ledger(self.bundle, self.folder, cap=8.0, founding=SeededEntropy("site"))
        self.worker = HospitalWorker(
            SiteSetup(
                site="site-0",
                folder=self.folder,
                audit=self.folder,
                bundle=self.bundle,
                roster={},
                keys_digest="",
                ceilings=Ceilings.model_validate(
                    {
                        "epsilon": 8.0,
                        "delta": 1e-4,
                        "rounds": 10,
                        "approved_studies": [self.bundle.digest.hex()],
                        "approved_backbones": "any",
                        "approved_code": "any",
                    }
                ),
                kill_switch=self.folder / "STOP",
                trainer=self._ready,
                split_id=self.ledger.split(0.2).identity,
                entropy=SeededEntropy("noise"),
            ),
            self.ledger,
        )

    def _ready(self):
        if self.faulty is not None:
            raise self.faulty
        return self.trainer

    def play(self, number: int, *, measures: bool = False, trains: bool = True):
        return self.worker.work(Work(number, 0, {}, trains=trains, measures=measures, counts=False))

    def kinds(self) -> list[str]:
        return [row.kind for row in self.ledger.history()]

    def steps(self, part: str) -> int:
        return sum(event.steps for event in self.ledger.events(part))


@pytest.fixture
def hospital(bundle, tmp_path):
    made = Hospital(bundle, tmp_path)
    yield made
    made.ledger.close()


# ---------------------------------------------------------------------- what is reserved


def test_a_plan_holds_every_round_every_measurement_and_all_spare_ones(bundle):
    assert plan_charges(bundle) == (
        Charge("train", "train", (DpEvent(SIGMA, RATE, 4 + 2),)),
        Charge("evaluate", "held_out", (DpEvent(NOISE, 1.0, 2 + 2),)),
    )


def test_a_plan_holds_the_statistics_and_their_retries(bundle, monkeypatch):
    monkeypatch.setattr(Study, "feature_count", property(lambda _: 3))
    charges = plan_charges(replace(bundle, statistics_noise=7.0))
    assert charges[0] == Charge("statistics", "train", (DpEvent(7.0, 1.0, 1 + 2),))


def test_the_first_round_reserves_the_whole_study_and_every_round_draws(hospital):
    whole = epsilon([DpEvent(SIGMA, RATE, 6)], DELTA)
    hospital.play(1)
    assert hospital.kinds() == ["genesis", "charge", "charge", "draw"]
    assert hospital.ledger.spent().train == whole
    hospital.worker.release(1)
    hospital.play(2)
    hospital.play(3, measures=True)
    hospital.worker.release(3)
    hospital.worker.release(2)  # not the open round's
    assert hospital.kinds()[4:] == ["release", "draw", "draw", "release"]
    assert hospital.ledger.spent().train == whole
    run = hospital.ledger.run_so_far()
    assert run.train == epsilon([DpEvent(SIGMA, RATE, 3)], DELTA)
    assert run.held_out == epsilon([DpEvent(NOISE, 1.0, 1)], DELTA)


def test_the_draw_is_durable_before_the_trainer_is_asked(hospital, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Trainer, "train", lambda self, *_: seen.append(hospital.kinds()[-1]) or np.zeros(1)
    )
    hospital.play(1)
    hospital.play(2)
    assert seen == ["draw", "draw"]


def test_a_fault_in_the_records_reserves_and_draws_nothing(hospital):
    hospital.faulty = DataError(Code.SITE_TOO_SMALL, "no")
    with pytest.raises(DataError):
        hospital.play(1)
    assert hospital.kinds() == ["genesis"]


def test_a_plan_beyond_the_studys_epsilon_is_refused_before_training(bundle, tmp_path):
    loud = Hospital(replace(bundle, noise_multiplier=0.9), tmp_path)
    with pytest.raises(RefusedError) as caught:
        loud.play(1)
    assert caught.value.code is Code.BUDGET_STUDY
    assert (loud.trainer.asked, loud.kinds()) == ([], ["genesis"])
    loud.ledger.close()


# ---------------------------------------------------------------------- crashes and ends


def test_after_a_restart_the_open_plan_goes_on_and_a_round_that_died_stays_drawn(hospital):
    hospital.play(1)
    hospital.trainer.fault = OSError("killed")
    with pytest.raises(OSError, match="killed"):
        hospital.play(2)
    hospital.restart()
    hospital.trainer.fault = None
    hospital.play(2)
    assert hospital.kinds().count("charge") == 2
    rounds = [
        (row.body["round"], row.body["attempt"])
        for row in hospital.ledger.history()
        if row.kind == "draw"
    ]
    assert rounds == [(1, 1), (2, 1), (2, 2)]
    hospital.worker.finished(CHAIN)
    assert hospital.steps("train") == 3


def test_when_the_run_is_over_the_rest_is_given_back_and_not_before(hospital):
    hospital.play(1)
    hospital.play(2)
    assert hospital.steps("train") == 6
    hospital.worker.finished(CHAIN)
    hospital.worker.finished(CHAIN)
    assert hospital.worker.final is CHAIN
    assert hospital.kinds().count("settle") == 1
    assert (hospital.steps("train"), hospital.steps("held_out")) == (2, 0)
    assert hospital.ledger.spent().epsilon == epsilon([DpEvent(SIGMA, RATE, 2)], DELTA)


def test_a_hospital_that_never_took_part_has_nothing_to_settle(hospital):
    hospital.worker.finished(CHAIN)
    assert (hospital.worker.final, hospital.kinds()) == (CHAIN, ["genesis"])


def test_a_study_that_used_up_its_plan_is_refused_without_a_gradient(hospital):
    for number in range(1, 7):
        hospital.play(number)
    hospital.trainer.asked.clear()
    with pytest.raises(RefusedError) as caught:
        hospital.play(7)
    assert caught.value.code is Code.BUDGET_PLAN
    assert hospital.trainer.asked == []
    hospital.play(8, trains=False, measures=True)  # what is left of it still runs
    assert hospital.trainer.asked == ["measure"]


def test_a_settled_study_that_goes_on_reserves_the_rest_and_no_more(hospital):
    for number in range(1, 5):
        hospital.play(number)
    hospital.worker.finished(CHAIN)
    hospital.play(5)
    assert hospital.steps("train") == 6
    hospital.play(6)
    with pytest.raises(RefusedError) as caught:
        hospital.play(7)
    assert caught.value.code is Code.BUDGET_PLAN


def test_control_mode_local_reserves_every_round_by_itself(bundle, tmp_path):
    study = bundle.study.model_dump()
    study["privacy"] |= {"mode": "local"}
    local = Hospital(replace(bundle, study=Study.model_validate(study)), tmp_path)
    local.play(1)
    local.play(2)
    local.worker.finished(CHAIN)
    assert local.kinds() == ["genesis", "charge", "charge"]
    assert local.steps("train") == 2
    local.ledger.close()


# ---------------------------------------------------------------------- what people read


def line(hospital) -> LedgerLine:
    return budget_report(hospital.folder).lines[0]


def test_the_report_shows_what_is_reserved_and_not_yet_run(hospital):
    hospital.play(1)
    hospital.play(2, measures=True)
    shown = line(hospital)
    assert shown == line(hospital)  # the kept one
    one = epsilon([DpEvent(SIGMA, RATE, 2)], DELTA)
    assert (shown.rounds, shown.planned, shown.run) == (2, 4, one)
    assert shown.epsilon == epsilon([DpEvent(SIGMA, RATE, 6)], DELTA)
    assert shown.reserved == shown.epsilon - one > 0
    report = budget_report(hospital.folder)
    assert "of it not yet run" in report.columns
    assert f"{shown.reserved:.3f} (4 steps)" in report.rows()[0]
    assert any("given back" in note for note in report.notes)
    assert report.to_json()["ledgers"][0]["planned"] == 4
    more = shown.forecast
    hospital.worker.finished(CHAIN)
    after, report = line(hospital), budget_report(hospital.folder)
    assert (after.planned, after.reserved, after.epsilon) == (None, 0.0, one)
    assert after.forecast == more + 4
    assert "of it not yet run" not in report.columns
    assert len(report.columns) == len(report.rows()[0])


def test_a_forecast_counts_the_whole_once_before_while_and_after_it_runs(hospital):
    def forecast():
        return forecast_study(
            hospital.bundle,
            hospital.ledger.history(),
            releases=2,
            split=hospital.ledger.split(0.2).identity,
            cap=8.0,
            delta=DELTA,
        )

    whole = epsilon([DpEvent(SIGMA, RATE, 6)], DELTA)
    before = forecast()
    assert (before.before, before.own, before.after) == (0.0, whole, whole)
    hospital.play(1)
    assert (forecast().before, forecast().after) == (whole, whole)
    hospital.worker.finished(CHAIN)
    one = epsilon([DpEvent(SIGMA, RATE, 1)], DELTA)
    assert (forecast().before, forecast().after) == (one, whole)


def test_the_statement_says_against_whom_and_for_what_was_drawn(hospital):
    hospital.play(1)
    hospital.play(2, measures=True)

    def statement():
        return privacy_statement(hospital.bundle, hospital.ledger.history(), site="site-0")

    running = statement()
    assert running["plan"]["settled"] is False
    assert (running["plan"]["reserved"], running["plan"]["drawn"]) == (6 + 4, 2 + 1)
    assert running["epsilon_spent"]["training"] == epsilon([DpEvent(SIGMA, RATE, 6)], DELTA)
    hospital.worker.finished(CHAIN)
    told = statement()
    assert told["plan"] == {
        "reserved": 3,
        "drawn": 3,
        "settled": True,
        "epsilon_drawn": told["epsilon_spent"],
    }
    assert (told["mode"], told["rounds_charged"]) == ("joint", 2)
    assert "share of the noise" in told["mode_explained"]
    coordinator, colluders, others = told["audiences"]
    study = hospital.bundle.study
    quorum, honest = study.quorum_size(5), study.quorum_size(5) - 1
    for audience, factor in (
        (coordinator, (quorum / honest) ** 0.5),
        (colluders, 1.0),
        (others, (1 / honest) ** 0.5),
    ):
        sigma = SIGMA * factor
        assert audience["noise_multiplier"] == pytest.approx(sigma)
        assert audience["epsilon"]["training"] == pytest.approx(
            epsilon([DpEvent(sigma, RATE, 2)], DELTA), rel=1e-6
        )
        assert audience["epsilon"]["held_out"] == epsilon([DpEvent(NOISE, 1.0, 1)], DELTA)
        assert f"Against {audience['told']}, everything" in told["statement"]
    assert colluders["epsilon"] == told["epsilon_spent"]
    assert coordinator["epsilon"]["training"] < colluders["epsilon"]["training"]
    assert others["epsilon"]["training"] > 2 * colluders["epsilon"]["training"]
    # No promise is made against everybody, as mode local may.
    assert not told["statement"].startswith("Everything")
