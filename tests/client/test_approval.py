"""Approval: each ceiling refuses with its own code and the numbers; nothing is trimmed."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approval import Approval, StudyFacts, approve, objections
from client.config import Ceilings
from common.crypto.identity import SiteKey
from common.errors import Code, RefusedError

KEY = SiteKey.from_seed(b"\x04" * 32)
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


def test_a_hospital_may_refuse_to_count_on_other_hospitals_noise() -> None:
    joint = dataclasses.replace(FACTS, joint=True)
    approve(joint, CEILINGS, stopped=False)
    alone = CEILINGS.model_copy(update={"accept_joint": False})
    approve(FACTS, alone, stopped=False)
    with pytest.raises(RefusedError) as caught:
        approve(joint, alone, stopped=False)
    assert caught.value.code is Code.APPROVAL_JOINT


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
    worst = StudyFacts(CODE, STUDY, BACKBONE, 3, rounds=101, epsilon=4.0, delta=1e-4, joint=True)
    alone = CEILINGS.model_copy(update={"accept_joint": False})
    codes = {objection.code for objection in objections(worst, alone, stopped=True)}
    assert len(codes) == 9
    bare = dataclasses.replace(worst, epsilon=None, delta=None)
    codes |= {objection.code for objection in objections(bare, CEILINGS, stopped=True)}
    # The other two are about the record of an approval and the roster, not about a study.
    elsewhere = {Code.APPROVAL_FORGED, Code.APPROVAL_SITE}
    assert codes == {code for code in Code if code.name.startswith("APPROVAL_")} - elsewhere


def test_an_empty_list_approves_nothing_and_any_approves_all() -> None:
    nothing = CEILINGS.model_copy(update={"approved_studies": ()})
    (objection,) = objections(FACTS, nothing, stopped=False)
    assert objection.code is Code.APPROVAL_STUDY
    every = CEILINGS.model_copy(update={"approved_studies": None})
    assert objections(FACTS, every, stopped=False) == ()


def signed(**changes) -> Approval:
    fields = {
        "site": "north",
        "study": STUDY,
        "code": CODE,
        "roster": bytes(32),
        "by": "Dr. Grey",
        "at": 1,
        "epsilon": 3.0,
        "delta": 1e-5,
    }
    return Approval(**(fields | changes)).signed(KEY)


def test_an_approval_stands_in_for_the_list_of_studies_and_for_nothing_else() -> None:
    nothing = CEILINGS.model_copy(update={"approved_studies": ()})
    assert objections(FACTS, nothing, stopped=False, approval=signed()) == ()
    lower = nothing.model_copy(update={"epsilon": 2.0})
    (objection,) = objections(FACTS, lower, stopped=False, approval=signed())
    assert objection.code is Code.APPROVAL_EPSILON


@pytest.mark.parametrize(
    ("approval", "codes", "expected"),
    [
        (signed(study=BACKBONE), None, Code.APPROVAL_STUDY),
        (signed(code=BACKBONE), None, Code.APPROVAL_CODE),
        (signed(code=BACKBONE), (BACKBONE.hex(),), Code.APPROVAL_CODE),
        (signed(), (BACKBONE.hex(),), Code.APPROVAL_CODE),
        (signed(), (), Code.APPROVAL_CODE),
    ],
)
def test_an_approval_of_another_study_or_of_other_code_is_none(
    approval: Approval, codes: tuple[str, ...] | None, expected: Code
) -> None:
    ceilings = CEILINGS.model_copy(update={"approved_code": codes})
    (objection,) = objections(FACTS, ceilings, stopped=False, approval=approval)
    assert objection.code is expected


def test_a_saved_approval_is_the_same_and_only_its_hospital_made_it(tmp_path) -> None:
    path = tmp_path / "approval.json"
    signed().save(path)
    found = Approval.load(path)
    assert found == signed()
    assert found.verified(KEY.public, "north") == found
    other = SiteKey.from_seed(bytes(32))
    for public, site in ((other.public, "north"), (KEY.public, "south")):
        with pytest.raises(RefusedError) as refused:
            found.verified(public, site)
        assert refused.value.code is Code.APPROVAL_FORGED
    bare = signed(epsilon=None, delta=None)
    bare.save(path)
    assert Approval.load(path).verified(KEY.public, "north") == bare


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
