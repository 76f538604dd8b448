import base64
import gzip
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.data.leakage import LabelWords, Limit, SectionCutter, hours_between, share_told
from common.tasks.cases import DIAGNOSIS_SECTIONS

NOON = datetime.fromisoformat("2020-03-05T12:00")
CUT = SectionCutter(DIAGNOSIS_SECTIONS)

SYNTHEA = """
1987-11-19

# Chief Complaint
- Cough

# History of Present Illness
Anna is a 60 year-old white female.

# Medications
acetaminophen 325 mg oral tablet

# Assessment and Plan
Patient is presenting with secretion-word (disorder).

## Plan

The patient was prescribed the following medications:
- secretion-word 50 mg
"""
MIMIC = """Chief Complaint:
cough

History of Present Illness:
Fever for three days.

Brief Hospital Course:
Treated for secretion-word with ceftriaxone.

Discharge Medications:
1. Aspirin

Discharge Diagnosis:
Primary:
- secretion-word
Secondary:
- diabetes, secretion-word

Acute Problems:
- secretion-word

Discharge Condition:
Stable.
"""
RADIOLOGY = """INDICATION: cough
FINDINGS: There is an opacity in the left lower lobe.
IMPRESSION: Left lower lobe secretion-word.
"""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (SYNTHEA, ("- Cough", "60 year-old", "acetaminophen")),
        (MIMIC, ("Fever for three days", "Aspirin", "Stable.")),
        (RADIOLOGY, ("cough", "opacity")),
        ("Lungs clear. Impression: secretion-word. Discharge condition: good", ("clear", "good")),
        ("**Assessment & Plan**\nsecretion-word\n\nPHYSICAL EXAM:\nwell", ("well",)),
        ("A/P: secretion-word, check labs: CBC, secretion-word", ()),
        ("3. Final diagnosis - secretion-word\n\nFamily history:\nnone", ("none",)),
        ("IMPRESSION AND RECOMMENDATION: secretion-word\n", ()),
        ("Diagnosis of secretion-word in 2010: treated", ()),
        ("Impressions\nsecretion-word\r\n\r\nVITALS:\r\nstable", ("stable",)),
    ],
)
def test_a_section_that_prints_the_diagnosis_is_cut_and_the_rest_stays(text, kept):
    left, count = CUT(text)
    assert "secretion-word" not in left
    assert count >= 1
    for words in kept:
        assert words in left
    assert "secretion-word" in text  # the control: it was there to be cut


def test_no_synthea_note_keeps_its_assessment_and_plan():
    root = Path(__file__).parents[3]
    folder = Path(os.environ.get("WARDROUND_DATA", root.parent / "shared" / "data"))
    path = folder / "synthea_fhir_10" / "DocumentReference.000.ndjson.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        data = [json.loads(line)["content"][0]["attachment"]["data"] for line in lines]
    notes = [base64.b64decode(part).decode() for part in data]
    tells = [note for note in notes if "presenting with" in note]
    assert len(tells) > 100  # the control: they do print it
    for note in notes:
        left, count = CUT(note)
        assert count == 1
        assert "presenting with" not in left
        assert "prescribed the following" not in left
        assert "# History of Present Illness" in left
        assert "# Medications" in left


def test_without_headings_to_cut_a_text_stays_as_it_is():
    assert SectionCutter(())(SYNTHEA) == (SYNTHEA, 0)
    plain = "Fever and cough. The impression of the nurse was fine.\nPlan to go home."
    assert CUT(plain) == (plain, 0)


def test_a_heading_of_a_lower_level_does_not_end_a_cut():
    text = "# Assessment\na\n## Plan\nb\n# Allergies\nnone\n"
    assert CUT(text) == ("# Allergies\nnone\n", 1)


def test_a_study_names_its_own_headings():
    cut = SectionCutter(("Beurteilung",))
    assert cut("Befund:\nfrei\nBEURTEILUNG:\ngeheim\n")[0] == "Befund:\nfrei\n"


@pytest.mark.parametrize(
    "unit", ["# ", "Impression ", "impression:", "a: ", "\n\n", "A B:\n", "* "]
)
@pytest.mark.timeout(60)
def test_no_text_keeps_the_cutter_busy_for_long(unit):
    # In linear time a fraction of a second; in quadratic time this would not end.
    text = unit * (200_000 // len(unit))
    assert len(CUT(text)[0]) <= len(text)


# --------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("moment", "seen"),
    [
        (NOON, True),
        (NOON + timedelta(seconds=1), False),
        (NOON - timedelta(days=1), True),
        (None, False),
        (
            datetime.fromisoformat("2020-03-05"),
            False,
        ),  # a date alone: written at any time of that day
        (datetime.fromisoformat("2020-03-04"), True),
        (NOON.replace(tzinfo=UTC), False),  # not to be compared
    ],
)
def test_only_what_was_certainly_written_in_time_is_seen(moment, seen):
    assert (Limit(NOON, "drop").judge(moment) == "") is seen


def test_midnight_is_a_time_for_measurements_and_for_the_encounters_own_start():
    midnight = datetime.fromisoformat("2020-03-05")
    assert Limit(NOON, "drop").judge(midnight, dated=True) == ""
    assert Limit(NOON, "drop", midnight).judge(midnight) == ""
    assert Limit(NOON, "drop").judge(midnight) != ""


def test_what_has_no_time_is_kept_only_where_the_study_says_so():
    assert Limit(NOON, "keep").judge(None) == ""
    assert Limit(None, "drop").judge(None) == ""


def test_the_earlier_of_two_limits_holds():
    assert Limit(NOON, "drop").earlier(NOON - timedelta(hours=1)).judge(NOON)
    assert not Limit(NOON, "drop").earlier(NOON + timedelta(hours=1)).judge(NOON)
    assert Limit(None, "drop").earlier(NOON).last == NOON


def test_hours_are_not_guessed_across_a_missing_zone():
    assert hours_between(NOON, NOON + timedelta(hours=3)) == 3
    assert hours_between(NOON, NOON.replace(tzinfo=UTC)) is None


# --------------------------------------------------------------------------------- words


def _words(told, elsewhere, *, patients=100, phrases=None):
    words = LabelWords(("heart failure", "asthma"), phrases)
    for i in range(patients):
        text = "Known HEART-FAILURE, legs swollen" if i < told else "legs swollen"
        words.add(f"h{i}", ("heart failure",), text)
        text = "no heart failure" if i < elsewhere else "wheeze"
        words.add(f"a{i}", ("asthma",), text)
    return words.leaks()


def test_a_label_that_stands_in_its_patients_texts_is_warned_of():
    (leak,) = _words(told=80, elsewhere=10)
    assert (leak.label, leak.here, leak.elsewhere) == ("heart failure", "80 %", "10 %")
    assert "heart failure" in str(leak)


@pytest.mark.parametrize(("told", "elsewhere"), [(0, 0), (4, 0), (20, 0), (60, 50), (90, 90)])
def test_words_that_stand_everywhere_or_nowhere_are_no_leak(told, elsewhere):
    assert _words(told, elsewhere) == ()


def test_no_warning_rests_on_a_small_count():
    assert _words(told=4, elsewhere=0, patients=4) == ()
    (leak,) = _words(told=50, elsewhere=3)
    assert leak.elsewhere == "fewer than 5"
    (leak,) = _words(told=98, elsewhere=0)
    assert leak.here == "all but fewer than 5"


def test_further_phrases_count_for_their_label_alone():
    phrases = {"heart failure": ("legs swollen",)}
    (leak,) = _words(told=0, elsewhere=0, phrases=phrases)
    assert leak.label == "heart failure"
    assert leak.here == "all"


def test_a_patient_with_many_notes_counts_once():
    words = LabelWords(("asthma", "gout"))
    for _ in range(50):
        words.add("one", ("asthma",), "asthma")
    for i in range(50):
        words.add(f"g{i}", ("gout",), "toe")
    assert words.leaks() == ()


@pytest.mark.parametrize(
    ("count", "total", "told"),
    [
        (0, 10, "none"),
        (4, 100, "fewer than 5"),
        (96, 100, "all but fewer than 5"),
        (100, 100, "all"),
        (5, 1000, "less than 1 %"),
        (12, 100, "12 %"),
    ],
)
def test_a_share_never_shows_a_small_count(count, total, told):
    assert share_told(count, total) == told
