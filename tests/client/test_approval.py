"""Approval: each ceiling refuses with its own code and the numbers; nothing is trimmed."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approval import StudyFacts, approve, objections
from client.config import Ceilings
from common.errors import Code, RefusedError

STUDY, BACKBONE, CODE = b"\x01" * 32, b"\x02" * 32, b"\x03" * 32
FACTS = StudyFacts(STUDY, BACKBONE, CODE, parties=5, rounds=100, epsilon=3.0, delta=1e-5)
CEILINGS = Ceilings(
    epsilon=3.0,
    delta=1e-5,
    rounds=100,
    minimum_sites=5,
    approved_studies=(STUDY.hex(),),
    approved_backbones=(BACKBONE.hex(),),
    approved_code=(CODE.hex(),),
)

BEYOND = [
    ({"epsilon": 3.0000001}, Code.APPROVAL_EPSILON, "3"),
    ({"epsilon": math.inf}, Code.APPROVAL_EPSILON, "inf"),
    ({"epsilon": math.nan}, Code.APPROVAL_EPSILON, "nan"),
    ({"epsilon": -1.0}, Code.APPROVAL_EPSILON, "-1"),
    ({"delta": 1.1e-5}, Code.APPROVAL_DELTA, "1.1e-05"),
    ({"delta": math.nan}, Code.APPROVAL_DELTA, "nan"),
    ({"rounds": 101}, Code.APPROVAL_ROUNDS, "101"),
    ({"rounds": 0}, Code.APPROVAL_ROUNDS, "0"),
    ({"parties": 4}, Code.APPROVAL_PARTIES, "4"),
    ({"study_digest": b"\x09" * 32}, Code.APPROVAL_STUDY, "090909090909"),
    ({"backbone_digest": b"\x09" * 32}, Code.APPROVAL_BACKBONE, "090909090909"),
    ({"code_digest": b"\x09" * 32}, Code.APPROVAL_CODE, "090909090909"),
    ({"epsilon": None, "delta": None}, Code.APPROVAL_NO_PRIVACY, "differential privacy"),
    ({"epsilon": None}, Code.APPROVAL_NO_PRIVACY, "differential privacy"),
    ({"delta": None}, Code.APPROVAL_NO_PRIVACY, "differential privacy"),
]


def test_a_study_exactly_at_every_ceiling_is_approved() -> None:
    approve(FACTS, CEILINGS, stopped=False)


@pytest.mark.parametrize(("change", "code", "shown"), BEYOND)
def test_a_study_beyond_one_ceiling_is_refused_with_its_own_code_and_the_numbers(
    change: dict, code: Code, shown: str
) -> None:
    facts = dataclasses.replace(FACTS, **change)
    with pytest.raises(RefusedError) as caught:
        approve(facts, CEILINGS, stopped=False)
    assert caught.value.code is code
    assert shown in caught.value.message
    assert [objection.code for objection in objections(facts, CEILINGS, stopped=False)] == [code]


def test_the_numbers_of_both_sides_are_named() -> None:
    facts = dataclasses.replace(FACTS, epsilon=8.0)
    (objection,) = objections(facts, CEILINGS, stopped=False)
    assert objection.message == "The study would spend epsilon 8; the ceiling here is 3."


def test_the_kill_switch_refuses_before_anything_else() -> None:
    worst = dataclasses.replace(FACTS, epsilon=99.0, rounds=999, parties=3)
    with pytest.raises(RefusedError) as caught:
        approve(worst, CEILINGS, stopped=True)
    assert caught.value.code is Code.APPROVAL_STOPPED


def test_every_objection_is_listed() -> None:
    worst = StudyFacts(CODE, STUDY, BACKBONE, parties=3, rounds=101, epsilon=4.0, delta=1e-4)
    codes = {objection.code for objection in objections(worst, CEILINGS, stopped=True)}
    assert len(codes) == 8
    bare = dataclasses.replace(worst, epsilon=None, delta=None)
    codes |= {objection.code for objection in objections(bare, CEILINGS, stopped=True)}
    assert codes == {code for code in Code if code.name.startswith("APPROVAL_")}


def test_an_empty_list_approves_nothing_and_any_approves_all() -> None:
    nothing = CEILINGS.model_copy(update={"approved_studies": ()})
    (objection,) = objections(FACTS, nothing, stopped=False)
    assert objection.code is Code.APPROVAL_STUDY
    every = CEILINGS.model_copy(update={"approved_studies": None})
    assert objections(FACTS, every, stopped=False) == ()


def test_a_hospital_may_allow_studies_without_privacy() -> None:
    bare = dataclasses.replace(FACTS, epsilon=None, delta=None)
    tolerant = CEILINGS.model_copy(update={"require_privacy": False})
    assert objections(bare, tolerant, stopped=False) == ()


@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(-5, 500),
    st.integers(-5, 500),
)
def test_no_study_above_a_ceiling_is_ever_approved(
    epsilon: float, rounds: int, parties: int
) -> None:
    facts = dataclasses.replace(FACTS, epsilon=epsilon, rounds=rounds, parties=parties)
    approved = not objections(facts, CEILINGS, stopped=False)
    assert approved == (0 < epsilon <= 3.0 and 0 < rounds <= 100 and parties >= 5)
