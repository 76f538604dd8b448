"""The terms of the task prognosis: one target, features with ranges, a bounded window."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from common.outcomes import Classes, Number
from common.tasks.prognosis import PrognosisTask

FEATURES = [
    {"name": "hr", "low": 0.0, "high": 300.0, "unit": "/min"},
    {"name": "crea", "low": 0.1, "high": 20.0, "scale": "log"},
]
NUMBER = {"column": "later", "low": 0.0, "high": 15.0, "unit": "mg/dL"}
CLASSES = {"kind": "prognosis", "labels": ["home", "died"], "features": FEATURES}


def task(**changes):
    given = {**CLASSES, **changes}
    return PrognosisTask.model_validate({k: v for k, v in given.items() if v is not None})


def test_a_class_or_a_number_is_predicted():
    assert task().outcome == Classes(("home", "died"))
    assert task().predicted == ("label",)
    found = task(labels=None, number=NUMBER, last="crea")
    assert found.outcome == Number(0.0, 15.0, "mg/dL")
    assert found.predicted == ("later",)


def test_what_learns_is_told_in_words():
    assert task(width=64).network_name == "LSTM of 64 over 2 measurements"
    assert task(layers=2).network_name.startswith("2-layer LSTM")


FAULTS = {
    "nothing to predict": ({"labels": None}, "labels"),
    "two things to predict": ({"number": NUMBER}, "number"),
    "one class": ({"labels": ["home"]}, "at least 2"),
    "a class twice": ({"labels": ["home", "home"]}, "labels.1"),
    "a feature twice": ({"features": [FEATURES[0]] * 2}, "features.1.name"),
    "no feature": ({"features": []}, "features"),
    "a feature that is the answer": (
        {"features": [{"name": "label", "low": 0.0, "high": 1.0}]},
        "features.0.name",
    ),
    "a range upside down": ({"features": [{"name": "hr", "low": 2.0, "high": 1.0}]}, "more than"),
    "the logarithm of zero": (
        {"features": [{"name": "hr", "low": 0.0, "high": 1.0, "scale": "log"}]},
        "above 0",
    ),
    "a last value for a class": ({"last": "crea"}, "without number"),
    "a last value of nothing": ({"labels": None, "number": NUMBER, "last": "na"}, "among features"),
    "the answer is the time": (
        {"labels": None, "number": {**NUMBER, "column": "time"}},
        "number.column",
    ),
    "one column twice": ({"columns": {"stay": "id", "patient": "id"}}, "patient"),
    "too long a window": ({"hours": 9000}, "hours"),
    "too many cells": (
        {
            "hours": 8784,
            "features": [{"name": f"f{i}", "low": 0.0, "high": 1.0} for i in range(200)],
        },
        "values a stay",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_terms_that_cannot_be_meant_are_refused(fault):
    changes, told = FAULTS[fault]
    with pytest.raises(ValidationError) as raised:
        task(**changes)
    assert told in str(raised.value)
