"""The task prognosis: each stay by itself, its hours alone, and what it learns."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.data.records import Record
from client.privacy.admission import admit
from client.privacy.engine import PerSampleEngine
from client.tasks import prognosis
from client.tasks.outcomes import losses_of, targets_of
from client.tasks.rows import inputs_of, rows_learner
from common.errors import Code, DataError, RefusedError
from common.statistics import StatisticsLayout, patient_words
from common.study import Study
from common.tasks.prognosis import PrognosisTask

torch.set_num_threads(1)
CPU = torch.device("cpu")
NAN = float("nan")
FEATURES = (
    {"name": "hr", "low": 0.0, "high": 200.0},
    {"name": "crea", "low": 0.1, "high": 10.0, "scale": "log"},
)
NUMBER = {"column": "later", "low": 0.0, "high": 10.0}


def task(**changes):
    given = {"kind": "prognosis", "features": FEATURES, "hours": 4, "width": 5, **changes}
    if "number" not in given:
        given.setdefault("labels", ("home", "died"))
    return PrognosisTask.model_validate(given)


def study(terms, mode="none"):
    private = {"mode": "local", "epsilon": 5.0, "delta": 1e-5, "clip_norm": 1.0}
    plain = Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "course",
            "task": {
                "kind": "tabular",
                "labels": ("no", "yes"),
                "features": ({"name": "a", "low": 0.0, "high": 1.0},),
            },
            "privacy": private if mode == "local" else {"mode": "none"},
            "sites": ({"id": "a"}, {"id": "b"}, {"id": "c"}),
        }
    )
    return plain.model_copy(update={"task": terms})


def stay(series, patient="p", label="home", number=NAN):
    values = np.array(series, np.float32)
    return Record(patient, "", label, None, "f", 7, number=number, series=values)


def inputs(terms, records, statistics=None):
    statistics = statistics or StatisticsLayout(len(terms.features)).initial()
    return inputs_of(prognosis.encode(terms, records), *statistics.values())


def statistics_of(terms, records):
    """Mean and deviation over all hospitals, as if there were one."""
    values = prognosis.encode(terms, records).values
    return StatisticsLayout(values.shape[2]).resolve(sum(map(patient_words, values)), 1)


def test_a_value_holds_until_the_next_within_the_stay_alone():
    series = np.array([[[NAN], [5.0], [NAN], [7.0]], [[NAN], [NAN], [NAN], [1.0]]])
    full, ages = prognosis.carried(series)
    assert np.array_equal(full[0, :, 0], [NAN, 5, 5, 7], equal_nan=True)
    assert np.array_equal(full[1, :, 0], [NAN, NAN, NAN, 1], equal_nan=True)
    assert ages[0, :, 0].tolist() == [np.inf, 0, 1, 0]


def test_the_model_sees_values_what_was_measured_and_how_long_ago():
    encoded = prognosis.encode(task(), [stay([[100, 1.0], [NAN, NAN], [300, 0.01]])])
    masks, fresh, lengths = encoded.tensors
    want = [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [NAN, NAN]]
    assert np.allclose(encoded.values[0], want, equal_nan=True)
    assert masks[0].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert torch.allclose(fresh[0, :, 0], torch.tensor([1, 2 ** (-1 / 6), 1, 0]))
    assert lengths.tolist() == [3]


def test_hours_after_the_window_are_not_seen():
    short = [[1, 1.0], [2, 2.0], [3, 3.0], [4, 4.0]]
    found = [inputs(task(), [stay(series)]) for series in (short, [*short, [199, 9.0]])]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stays_inputs_do_not_depend_on_the_others():
    records = list(prognosis.probes(task()))
    whole = inputs(task(), records)
    for at, record in enumerate(records):
        for part, alone in zip(whole, inputs(task(), [record]), strict=True):
            assert torch.equal(part[at : at + 1], alone)


def test_a_prediction_depends_on_the_hours_of_its_own_stay_alone():
    terms = task(number=NUMBER, last="crea", layers=2)
    torch.manual_seed(0)
    module = prognosis.network(terms)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
    records = list(prognosis.probes(terms))
    given = inputs(terms, records)
    found = module(*given)
    other = [part.clone() for part in given]
    for part in other[:3]:
        for row, length in enumerate(given[3]):
            part[row, length:] = 9.0
        part[0] = 5.0
    again = module(*other)
    assert torch.allclose(found[1:], again[1:], atol=1e-6)
    assert not torch.allclose(found[:1], again[:1], atol=1e-3)  # Control: its own hours matter.


def test_first_predictions_favour_no_label_or_are_the_last_value():
    records = [stay([[90, 2.5], [NAN, NAN]]), stay([[90, NAN]]), stay([[90, 50.0]])]
    assert not bool(prognosis.network(task())(*inputs(task(), records)).any())
    terms = task(number=NUMBER, last="crea")
    found = prognosis.network(terms)(*inputs(terms, records))
    assert found[:, 0].tolist() == [0.25, 0.0, 1.0]
    assert prognosis.encode(terms, records).tensors[3][:, 1].tolist() == [0, 1, 0]


def test_first_values_are_the_same_bits_everywhere():
    digest = hashlib.sha256()
    for name, parameter in sorted(prognosis.network(task(layers=2)).named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    assert digest.hexdigest()[:16] == "25146862b2af1679"


def test_another_network_has_another_digest_and_other_columns_have_not():
    plain = prognosis.architecture(task())[0]
    assert plain == prognosis.architecture(task(columns={"stay": "id"}, max_stays=2))[0]
    others = [
        task(width=6),
        task(hours=5),
        task(layers=2),
        task(labels=("a", "b")),
        task(number=NUMBER),
        task(number=NUMBER, last="crea"),
        task(features=FEATURES[:1]),
    ]
    assert len({plain, *(prognosis.architecture(other)[0] for other in others)}) == 8


@pytest.mark.parametrize(
    ("series", "told"),
    [
        (None, "no series"),
        (np.zeros((3, 1), np.float32), "no series"),
        (np.zeros(3, np.float32), "no series"),
        (np.full((2, 2), np.inf, np.float32), "not finite"),
    ],
)
def test_a_record_that_does_not_fit_the_study_is_named(series, told):
    with pytest.raises(DataError, match=told) as raised:
        prognosis.encode(task(), [replace(stay([[1, 1]]), series=series)])
    assert raised.value.code is Code.DATA_VALUE
    assert "f:7" in str(raised.value)


def test_a_stay_without_hours_is_computed_too():
    empty = stay(np.zeros((0, 2)))
    module = prognosis.network(task())
    with torch.no_grad():
        module.output.weight.fill_(1.0)
    assert torch.isfinite(module(*inputs(task(), [empty]))).all()


@pytest.mark.parametrize(
    "changes", [{}, {"layers": 2}, {"number": NUMBER}, {"number": NUMBER, "last": "crea"}]
)
@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_every_network_is_admitted_with_either_engine(changes, engine):
    terms = task(**changes)
    learner = rows_learner(
        prognosis, study(terms, "local"), prognosis.probes(terms), (), device=CPU
    )
    torch.manual_seed(1)
    with torch.no_grad():  # at the first values only the last layers have a gradient
        for parameter in learner.module.parameters():
            parameter.normal_(0, 0.5)
    assert learner.patient_count() == 3
    assert admit(learner.probe(), kind=engine).startswith(engine)
    assert admit(learner, kind=engine).startswith(engine)


def test_control_a_network_that_looks_at_other_patients_is_not_admitted(monkeypatch):
    terms = task()
    learner = rows_learner(
        prognosis, study(terms, "local"), prognosis.probes(terms), (), device=CPU
    )
    with torch.no_grad():
        learner.module.output.weight.normal_(0, 0.5)
    honest = prognosis.Trajectory.forward

    def mixed(self, values, *rest):
        return honest(self, values - values.mean(0), *rest)

    monkeypatch.setattr(prognosis.Trajectory, "forward", mixed)
    with pytest.raises(RefusedError):
        admit(learner)


def course(count, seed, *, hours=8):
    """Stays whose heart rate rises or falls, half of it unmeasured; creatinine drifts with it."""
    stream = np.random.default_rng(seed)
    made = []
    for patient in range(count):
        ill = int(stream.random() < 0.5)
        hour = np.arange(stream.integers(hours // 2, hours + 1))
        rate = 90 + stream.normal(0, 10) + (2 * ill - 1) * 3 * hour + stream.normal(0, 2, len(hour))
        level = stream.uniform(1, 4) * np.ones(len(hour))
        series = np.stack([rate, level], 1)
        series[stream.random(series.shape) < 0.5] = NAN
        later = level[-1] * (1.4 if ill else 0.8)
        made.append(stay(series, str(patient), ("home", "died")[ill], number=later))
    return made


def trained(terms, records, *, steps, rate):
    module = prognosis.network(terms)
    given = inputs(terms, records, statistics_of(terms, records))
    targets = targets_of(terms.outcome, records)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        losses_of(terms.outcome, module(*given), targets).mean().backward()
        optimizer.step()
    return module


def answers(terms, seed, *, count=120):
    """What is predicted of new stays after training, and what is true; and the last values."""
    records = course(count, seed)
    module = trained(terms, records, steps=60, rate=0.03)
    new = course(100, seed + 1)
    given = inputs(terms, new, statistics_of(terms, records))
    with torch.no_grad():
        return module(*given), targets_of(terms.outcome, new), given[-1][..., 0]


def test_it_learns_where_a_course_leads():
    found, truth, _ = answers(task(hours=8, width=8), 10, count=400)
    # Nobody is right of all: some stays have one heart rate or none.
    assert float((found.argmax(1) == truth).float().mean()) > 0.85


def test_it_corrects_the_last_value():
    terms = task(hours=8, width=8, number=NUMBER, last="crea")
    found, truth, last = answers(terms, 2)
    losses = losses_of(terms.outcome, found, truth)
    assert float(losses.mean()) < 0.5 * float((last - truth).square().mean())


def test_a_private_step_is_clipped_by_patient_over_all_of_his_stays():
    terms = task(hours=8, width=6)
    records = [replace(r, patient=str(i // 2)) for i, r in enumerate(course(8, 4))]
    learner = rows_learner(prognosis, study(terms, "local"), records, (), device=CPU)
    engine = PerSampleEngine(learner.module, learner.trainable(), 1e-3)
    rows, owner = learner.rows_of(np.arange(4))
    assert len(rows) == 8
    found = engine.clipped_sum(learner.losses(rows), owner, 4).gradients
    norm = sum(float(g.square().sum()) for g in found.values()) ** 0.5
    assert 0 < norm <= 4 * engine.sensitivity
