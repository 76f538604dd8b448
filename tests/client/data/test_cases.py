from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from client.data.cases import CaseMaker, groups_of, records_of, wanted_of
from client.data.encounters import (
    CodeEntry,
    CodeSystem,
    DrugEntry,
    Encounter,
    ImageEntry,
    Measurement,
    Note,
)
from client.data.leakage import UNDATED
from common.tasks.cases import CaseRules, GroupRules, System

START = datetime.fromisoformat("2020-03-01T10:00")
PNEUMONIA = {"label": "pneumonia", "system": "icd10", "codes": ["J12", "J18"]}
FAILURE = {"label": "heart failure", "system": "icd10", "codes": ["I50"]}
CODES = {"kind": "codes", "map": [PNEUMONIA, FAILURE]}
MORTALITY = {"kind": "mortality"}
CRP = {
    "name": "crp",
    "items": ["C-reactive protein", "1988-5"],
    "unit": "mg/l",
    "convert": [{"unit": "mg/dl", "factor": 10.0}],
    "low": 0.0,
    "high": 500.0,
}
HR = {"name": "hr", "items": ["heart rate"], "low": 20.0, "high": 250.0, "take": "mean"}


def at(hours):
    return START + timedelta(hours=hours)


def encounter(**changes):
    plain = Encounter(
        patient="p1",
        encounter="e1",
        site="east",
        start=START,
        end=at(72),
        age=67.0,
        sex="female",
        died=False,
        file="stays.csv",
        line=7,
        notes=(
            Note("Fever and cough.", "admission", at(1)),
            Note("Better.\nDischarge Diagnosis:\npneumonia", "discharge", at(70)),
        ),
        codes=(
            CodeEntry("icd10", "J18.9", 1, None, "Pneumonia"),
            CodeEntry("icd10", "E11.9", 2, None, "Diabetes"),
        ),
        drugs=(
            DrugEntry("atc", "C09AA05", "Ramipril", at(2), None),
            DrugEntry("atc", "J01CR02", "Amoxicillin", at(30), None),
        ),
        measurements=(
            Measurement("C-Reactive  Protein", 120.0, "mg/L", at(1.5)),
            Measurement("1988-5", 14.0, "mg/dL", at(5)),
            Measurement("Heart Rate", 80.0, "", at(1.1)),
            Measurement("Heart Rate", 100.0, "", at(1.9)),
            Measurement("Heart Rate", 90.0, "", at(30)),
        ),
    )
    return replace(plain, **changes)


def rules(**sections):
    return CaseRules.model_validate({"label": CODES, **sections})


def case(stay=None, *, answered=True, picture=None, **sections):
    make = CaseMaker(rules(**sections), answered=answered, picture=picture)
    return make(encounter() if stay is None else stay), make.tally.counts


def left_out(stay=None, **sections):
    record, counts = case(stay, **sections)
    assert record is None
    ((reason, count),) = counts.items()
    assert count == 1
    return reason


def test_an_encounter_becomes_one_record():
    record, counts = case(notes={}, values=[CRP, HR])
    assert (record.patient, record.encounter, record.site) == ("p1", "e1", "east")
    assert (record.file, record.line, record.label) == ("stays.csv", 7, "pneumonia")
    assert record.text == "Fever and cough.\n\nBetter."
    assert record.values == (140.0, 90.0)
    assert record.groups == ("sex:female", "age:65-79")
    assert counts["sections cut that print the diagnosis"] == 1


def test_encounters_and_rules_speak_of_the_same_code_systems():
    assert get_args(System) == get_args(CodeSystem)


# -------------------------------------------------------------------------------- labels


def coded(*entries):
    return encounter(codes=tuple(CodeEntry(*entry) for entry in entries))


@pytest.mark.parametrize("code", ["J18.9", "J189", "j18", "J12.82"])
def test_dots_and_case_of_icd_codes_do_not_matter(code):
    assert case(coded(("icd10", code, 1, None)))[0].label == "pneumonia"


def test_codes_of_another_system_with_the_same_letters_are_another_thing():
    assert (
        left_out(coded(("icd9", "J18.9", 1, None))) == "encounters whose codes stand for no label"
    )


def test_codes_that_are_no_beginnings_are_compared_whole():
    target = {
        "kind": "codes",
        "map": [{"label": "pneumonia", "system": "snomed", "codes": ["2336"]}],
    }
    whole = coded(("snomed", "2336", 1, None))
    longer = coded(("snomed", "233604007", 1, None))
    assert case(whole, label=target)[0].label == "pneumonia"
    assert case(longer, label=target)[0] is None


def test_free_text_is_compared_by_whole_words():
    target = {
        "kind": "codes",
        "rank": "any",
        "map": [{"label": "shock", "system": "name", "codes": ["cardiovascular|shock"]}],
    }
    hit = coded(("name", "Cardiovascular|Shock / hypotension", None, None))
    miss = coded(("name", "cardiovascular|shockwave", None, None))
    assert case(hit, label=target)[0].label == "shock"
    assert case(miss, label=target)[0] is None


def test_only_the_principal_diagnosis_counts_where_the_study_says_so():
    stay = coded(("icd10", "I50", 1, None), ("icd10", "J18", 2, None))
    assert case(stay)[0].label == "heart failure"
    anything = {**CODES, "rank": "any"}
    assert left_out(stay, label=anything) == "encounters whose codes stand for several labels"
    assert case(stay, label={**anything, "several": "first"})[0].label == "pneumonia"
    everything = case(stay, label={**anything, "several": "all"})[0]
    assert (everything.label, everything.labels) == (None, ("pneumonia", "heart failure"))
    unranked = coded(("icd10", "J18", None, None))
    assert left_out(unranked) == "encounters without principal diagnoses to label"


def test_encounters_that_match_no_label_are_left_out_unless_the_study_has_a_rest():
    stay = coded(("icd10", "Z00", 1, None))
    assert left_out(stay) == "encounters whose codes stand for no label"
    assert case(stay, label={**CODES, "rest": "other"})[0].label == "other"


@pytest.mark.parametrize(("died", "label"), [(True, "died"), (False, "survived")])
def test_mortality_is_a_label(died, label):
    assert case(encounter(died=died), label=MORTALITY)[0].label == label


def test_a_death_inside_the_observation_window_is_not_predicted():
    stay = encounter(died=True, end=at(20))
    window = {"to_hours": 24.0}
    reason = left_out(stay, label=MORTALITY, window=window)
    assert reason == "encounters that ended before the observation window"
    assert case(encounter(died=True), label=MORTALITY, window=window)[0].label == "died"
    unknown = left_out(encounter(died=None), label=MORTALITY)
    assert unknown == "encounters that do not say whether the patient died"


def test_survival_is_the_time_from_the_window_to_death_or_discharge():
    window = {"to_hours": 24.0}
    record, _ = case(encounter(died=True), label={"kind": "survival"}, window=window)
    assert (record.number, record.event) == (2.0, True)
    record, _ = case(label={"kind": "survival", "unit": "hours"}, window=window)
    assert (record.number, record.event) == (48.0, False)


def test_a_number_to_come_is_taken_from_its_own_hours():
    target = {"kind": "number", "quantity": HR, "from_hours": 24.0, "to_hours": 48.0}
    window = {"to_hours": 24.0}
    record, _ = case(label=target, window=window, values=[HR])
    assert record.number == 90.0
    assert record.values == (90.0,)  # the mean of hours 1 and 2, not the answer
    none = encounter(measurements=())
    assert left_out(none, label=target, window=window) == (
        "encounters without the measurement to predict"
    )
    with pytest.raises(ValidationError, match="the answer would be seen"):
        rules(label={**target, "from_hours": 12.0}, window=window)
    with pytest.raises(ValidationError, match="the answer would be seen"):
        rules(label=target)


def test_drugs_after_the_window_are_labels_and_those_before_are_inputs():
    target = {
        "kind": "codes",
        "source": "drugs",
        "rank": "any",
        "several": "all",
        "map": [
            {"label": "ace", "system": "atc", "codes": ["C09"]},
            {"label": "antibiotic", "system": "atc", "codes": ["J01"]},
        ],
    }
    sections = {"label": target, "window": {"to_hours": 24.0}}
    record, counts = case(**sections, codes={"drugs": ["atc"], "diagnoses": ["icd10"]})
    assert record.labels == ("antibiotic",)
    assert record.codes == ()
    assert counts["drugs that stand for a label"] == 2
    assert counts[f"diagnosis codes {UNDATED}"] == 2
    assert case(label=target)[0].labels == ("ace", "antibiotic")


def test_a_file_to_be_predicted_needs_no_label():
    record, _ = case(encounter(codes=()), answered=False, notes={})
    assert record.label is None
    assert record.text


# ------------------------------------------------------------------------------- leakage


def test_nothing_after_the_observation_window_is_seen():
    sections = {"notes": {}, "values": [CRP, HR], "window": {"to_hours": 24.0}}
    record, counts = case(**sections)
    assert record.text == "Fever and cough."
    assert record.values[1] == 90.0
    assert counts["notes after the observation window or the label"] == 1
    assert counts["measurements after the observation window or the label"] == 1
    assert "Better" in case(notes={})[0].text  # the control: without a window it is seen


def test_nothing_after_the_label_was_known_is_seen():
    stay = encounter(codes=(CodeEntry("icd10", "J18", 1, at(10)),))
    assert case(stay, notes={})[0].text == "Fever and cough."
    assert "Better" in case(stay, notes={}, after_label="keep")[0].text
    zoned = encounter(codes=(CodeEntry("icd10", "J18", 1, at(10).replace(tzinfo=UTC)),))
    assert left_out(zoned) == "encounters whose label has a time that cannot be compared"


def test_notes_without_a_time_are_left_out_under_a_window_unless_the_study_keeps_them():
    stay = encounter(notes=(Note("Undated.", "x", None), Note("Fever.", "x", at(1))))
    window = {"to_hours": 24.0}
    record, counts = case(stay, notes={}, window=window)
    assert record.text == "Fever."
    assert sum(counts.values()) == 1
    assert case(stay, notes={"undated": "keep"}, window=window)[0].text == "Undated.\n\nFever."


def test_a_note_with_a_date_alone_counts_as_written_at_the_end_of_that_day():
    stay = encounter(notes=(Note("Dated.", "x", datetime.fromisoformat("2020-03-02")),))
    assert left_out_all(stay, {"to_hours": 24.0}) == 1
    assert case(stay, notes={}, window={"to_hours": 48.0})[0].text == "Dated."


def left_out_all(stay, window):
    record, counts = case(stay, notes={}, window=window)
    assert record is None
    return counts["notes after the observation window or the label"]


def test_codes_that_stand_for_a_label_are_never_inputs():
    record, counts = case(codes={"diagnoses": ["icd10"], "undated": "keep"})
    assert record.codes == ("icd10:E119",)
    assert counts["diagnosis codes that stand for a label"] == 1


def test_diagnoses_without_a_time_are_no_inputs_unless_the_study_keeps_them():
    assert case(codes={"diagnoses": ["icd10"]})[0].codes == ()
    kept = case(codes={"diagnoses": ["icd10"], "undated": "keep", "characters": 3})[0]
    assert kept.codes == ("icd10:E11",)


def test_a_synthea_note_loses_its_assessment_and_plan():
    text = (
        "# Chief Complaint\n- Cough\n\n# Assessment and Plan\npneumonia\n\n## Plan\n- pneumonia\n"
    )
    stay = encounter(notes=(Note(text, "note", START),))
    assert case(stay, notes={})[0].text == "# Chief Complaint\n- Cough"
    assert "pneumonia" in case(stay, notes={"cut_sections": []})[0].text


# -------------------------------------------------------------------------------- inputs


def test_notes_are_chosen_by_kind_and_joined_in_the_order_asked_for():
    kinds = {"kinds": ["Discharge", "admission"], "order": "kind"}
    assert case(notes=kinds)[0].text == "Better.\n\nFever and cough."
    record, counts = case(notes={"kinds": ["ADMISSION"]})
    assert record.text == "Fever and cough."
    assert counts["notes of other kinds"] == 1
    assert left_out_kinds() == "encounters without a note that may be read"


def left_out_kinds():
    record, counts = case(notes={"kinds": ["radiology"]})
    assert record is None
    return next(reason for reason in counts if reason.startswith("encounters"))


def test_texts_are_deidentified_where_the_study_asks_for_it():
    stay = encounter(notes=(Note("Dr. Smith saw her on 3/14/2019.", "x", at(1)),))
    make = CaseMaker(rules(notes={"deidentify": True}))
    assert make(stay).text == "[NAME] saw her on [DATE]."
    assert make.replaced == {"name": 1, "date": 1}
    assert "Smith" in case(stay, notes={})[0].text


def test_a_series_has_a_row_for_each_hour_from_time_zero():
    series = {"hours": 6, "quantities": [CRP, HR]}
    record, counts = case(series=series)
    expected = np.full((6, 2), np.nan)
    expected[1], expected[5, 0] = (120, 90), 140
    np.testing.assert_array_equal(record.series, expected)
    assert record.series.dtype == np.float32
    assert counts["measurements outside the hours of the series"] == 1
    assert counts["crp: converted"] == 1
    with pytest.raises(ValidationError, match="nothing would be there"):
        rules(series={**series, "hours": 48}, window={"to_hours": 24.0})


@pytest.mark.parametrize(
    ("unit", "value", "reason"),
    [
        ("mmol/l", np.nan, "crp: in another unit"),
        ("", np.nan, "crp: without a unit"),
        ("MG / L", 7.0, None),
        ("mg/dl", 70.0, "crp: converted"),
    ],
)
def test_a_unit_is_converted_only_by_a_declared_factor(unit, value, reason):
    stay = encounter(measurements=(Measurement("1988-5", 7.0, unit, at(1)),))
    record, counts = case(stay, values=[CRP])
    np.testing.assert_equal(record.values[0], value)
    assert list(counts) == ([] if reason is None else [reason])


def test_both_signs_for_micro_are_one_unit():
    creatinine = {"name": "c", "items": ["c"], "unit": "µmol/l", "low": 0.0, "high": 2000.0}
    stay = encounter(measurements=(Measurement("c", 7.0, "\u03bcmol/L", at(1)),))
    assert case(stay, values=[creatinine])[0].values == (7.0,)


@pytest.mark.parametrize(("outside", "value"), [("clip", 250.0), ("drop", np.nan)])
def test_values_outside_the_bounds_are_counted(outside, value):
    stay = encounter(measurements=(Measurement("heart rate", 999.0, "", at(1)),))
    record, counts = case(stay, values=[{**HR, "outside": outside}])
    np.testing.assert_equal(record.values[0], value)
    assert counts["hr: outside the bounds"] == 1
    broken = encounter(measurements=(Measurement("heart rate", np.inf, "", at(1)),))
    assert case(broken, values=[HR])[1]["hr: not a finite number"] == 1


@pytest.mark.parametrize(
    ("take", "value"),
    [("first", 80), ("last", 90), ("min", 80), ("max", 100), ("sum", 270), ("mean", 90)],
)
def test_of_several_values_the_study_says_which(take, value):
    assert case(values=[{**HR, "take": take}])[0].values == (value,)


def test_age_and_sex_are_values_where_the_study_says_so():
    facts = [
        {"name": "age", "of": "age", "low": 18.0, "high": 90.0},
        {"name": "female", "of": "female", "low": 0.0, "high": 1.0},
    ]
    assert case(values=facts)[0].values == (67.0, 1.0)
    assert np.isnan(case(encounter(age=None, sex=None), values=facts)[0].values).all()


def test_the_first_or_last_image_that_may_be_seen_is_read():
    images = tuple(
        ImageEntry(Path(name), when) for name, when in (("b", at(5)), ("a", at(1)), ("c", at(50)))
    )
    read = []

    def picture(entry):
        read.append(entry.path.name)
        return np.zeros((2, 2), np.uint8)

    window = {"to_hours": 24.0}
    for which in ("first", "last"):
        case(encounter(images=images), image=which, window=window, picture=picture)
    assert read == ["a", "b"]
    assert case(image="first", picture=picture)[0].image is None
    with pytest.raises(TypeError):
        case(encounter(images=images), image="first")


# ---------------------------------------------------------------------------- qualifying


@pytest.mark.parametrize(
    ("changes", "qualify", "reason"),
    [
        ({"age": 17.0}, {"min_age": 18.0}, "of other ages"),
        ({"age": 90.0}, {"max_age": 89.0}, "of other ages"),
        ({"age": None}, {"min_age": 18.0}, "without an age"),
        ({"sex": None}, {"sex": "female"}, "of another or unknown sex"),
        ({"end": at(5)}, {"min_hours": 6.0}, "that are too short"),
        ({"end": None}, {"min_hours": 6.0}, "without a start and an end"),
    ],
)
def test_encounters_that_do_not_qualify_are_left_out_and_counted(changes, qualify, reason):
    assert left_out(encounter(**changes), qualify=qualify) == f"encounters {reason}"
    assert case(qualify=qualify)[0] is not None  # the control


def test_a_window_needs_the_time_that_it_begins_at():
    reason = left_out(encounter(start=None), window={"to_hours": 24.0})
    assert reason == "encounters without the time that the window begins at"
    assert case(encounter(start=None, end=None))[0] is not None


def test_of_a_patient_the_first_encounters_are_taken():
    make = CaseMaker(rules(qualify={"most": 1}))
    stays = [encounter(), encounter(encounter="e2"), encounter(patient="p2")]
    assert [r.patient for r in records_of(stays, make)] == ["p1", "p2"]
    assert make.tally.counts == {"encounters beyond the number taken of a patient": 1}


@pytest.mark.parametrize(
    ("age", "band"),
    [(0.5, "0-17"), (18.0, "18-44"), (64.9, "45-64"), (90.0, "80+"), (None, "unknown")],
)
def test_age_bands_are_public(age, band):
    assert groups_of(encounter(age=age, sex=None), GroupRules()) == ("sex:unknown", f"age:{band}")
    assert groups_of(encounter(), GroupRules(sex=False, age_edges=())) == ()


# --------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"values": [HR, HR]}, "listed twice"),
        ({"values": [{**HR, "items": []}]}, "is missing"),
        ({"values": [{**HR, "low": 300.0}]}, "must be more than low"),
        ({"values": [{**HR, "convert": [{"unit": "x", "factor": 2.0}]}]}, "needs the unit"),
        ({"label": {**CODES, "source": "drugs"}}, "set it to any"),
        ({"label": {**CODES, "rest": "pneumonia"}}, "also a label"),
        ({"label": {**CODES, "rest": "other", "several": "all"}}, "has no effect"),
        ({"window": {"from_hours": 2.0, "to_hours": 1.0}}, "must be after from_hours"),
        ({"groups": {"age_edges": [65, 45]}}, "must rise"),
        ({"series": {"hours": 2, "quantities": [HR]}, "window": {"zero": "end"}}, "must be start"),
        ({"notes": {"phrases": [{"label": "gout", "phrases": ["toe"]}]}}, "not a label"),
        ({"nodes": {}}, "Extra inputs"),
    ],
)
def test_rules_that_contradict_themselves_are_refused(sections, message):
    with pytest.raises(ValidationError, match=message):
        rules(**sections)


def test_rules_name_their_labels_in_order():
    assert rules(label={**CODES, "rest": "other"}).labels == ("pneumonia", "heart failure", "other")
    assert rules(label=MORTALITY).labels == ("survived", "died")
    assert rules(label={"kind": "survival"}).labels == ()


def test_rules_say_what_a_reader_has_to_collect():
    plain = wanted_of(rules())
    assert (plain.codes, plain.notes, plain.drugs, plain.measurements) == (
        True,
        False,
        False,
        False,
    )
    target = {"kind": "number", "quantity": CRP, "from_hours": 24.0, "to_hours": 48.0}
    wanted = wanted_of(
        rules(
            label=target,
            window={"to_hours": 24.0},
            notes={"kinds": ["admission"]},
            values=[HR],
            codes={"drugs": ["atc"]},
        )
    )
    assert (wanted.codes, wanted.notes, wanted.drugs) == (False, True, True)
    assert wanted.categories == ("admission",)
    assert [item.name for item in wanted.items] == ["heart rate", "C-reactive protein", "1988-5"]
    assert all(item.unit is None for item in wanted.items)
