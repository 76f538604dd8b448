"""The terms of `multimodal`: any inputs, told apart by their columns."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from common.outcomes import Classes, Number
from common.tasks.multimodal import MultimodalTask

NUMBERS = {"features": [{"name": "crp", "low": 0.0, "high": 80.0}]}
SERIES = {"features": [{"name": "hr", "low": 30.0, "high": 200.0}], "hours": 6}


def task(**terms):
    return MultimodalTask.model_validate(
        {"kind": "multimodal", "labels": ["no", "yes"], "text": {}} | terms
    )


def test_any_inputs_will_do_and_their_features_come_in_order():
    made = task(image={}, numbers=NUMBERS, series=SERIES)
    assert made.modalities == ("text", "image", "numbers", "series")
    assert [feature.name for feature in made.features] == ["crp", "hr"]
    assert made.network_name == "gated fusion of text, image, numbers, series, width 32"
    assert made.outcome == Classes(("no", "yes"))
    assert task().features == ()
    assert not made.pretrained


def test_a_number_may_be_predicted_instead():
    made = task(labels=[], number={"column": "cost", "low": 0.0, "high": 9.0}, numbers=NUMBERS)
    assert made.outcome == Number(0.0, 9.0)
    assert made.predicted == ("cost",)
    assert made.as_tabular().predicted == ("cost",)


def test_the_parts_are_tasks_of_their_own():
    made = task(numbers=NUMBERS, series={**SERIES, "stay": "label_id", "time": "hour"})
    assert made.as_tabular().features == made.numbers.features
    assert made.as_prognosis().columns.stay == "label_id"
    assert task().as_tabular() is None
    assert task().as_prognosis() is None


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ({"text": None}, "names no input"),
        ({"labels": []}, "labels: is missing"),
        ({"labels": ["a"]}, "must list at least 2"),
        ({"labels": ["a", "a"]}, "labels.1: is listed twice"),
        ({"number": {"column": "n", "low": 0.0, "high": 1.0}}, "cannot stand beside labels"),
        ({"text": {"column": "patient"}}, "text.column: is also another column"),
        ({"image": {"column": "text"}}, "image.column: is also another column"),
        (
            {"numbers": {"features": [{"name": "label", "low": 0.0, "high": 1.0}]}},
            "numbers.features.0.name: is also another column",
        ),
        ({"series": {**SERIES, "stay": "text"}}, "series.stay: is also another column"),
        (
            {"series": {"features": [{"name": "time", "low": 0.0, "high": 1.0}]}},
            "series.features.0.name: is also another column",
        ),
        ({"image": {"size": 4}}, "image.size"),
        (
            {"image": {"size": 8, "network": {"kind": "resnet", "widths": [8, 8, 8, 8]}}},
            "leaves 1 of 8",
        ),
    ],
)
def test_terms_that_cannot_be_meant_are_refused(terms, told):
    with pytest.raises(ValidationError) as caught:
        task(**terms)
    assert told in str(caught.value)
