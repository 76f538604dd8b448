"""FHIR exports: what a reader makes of them, and what it makes of what is wrong with them."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import socket
from collections import Counter
from datetime import UTC, datetime

import pytest

from client.data.cases import CaseMaker, records_of, wanted_of
from client.data.readers.fhir import FhirReader
from client.data.readers.files import Item, Wanted
from common.errors import Code, DataError
from common.tasks.cases import CaseRules


def moment(*parts):
    """In UTC, as readers give times: without a zone."""
    return datetime(*parts, tzinfo=UTC).replace(tzinfo=None)


CANARY = "canary-7f3a"
EVERYTHING = Wanted(notes=True, codes=True, drugs=True, measurements=True, admission_diagnosis=True)
SNOMED, ICD = "http://snomed.info/sct", "http://hl7.org/fhir/sid/icd-10-cm"
RXNORM, LOINC = "http://www.nlm.nih.gov/research/umls/rxnorm", "http://loinc.org"


def coded(system, code, display=None):
    entry = {"system": system, "code": code}
    return {"coding": [entry if display is None else {**entry, "display": display}]}


def packed(text, kind="text/plain"):
    return {"contentType": kind, "data": base64.b64encode(text.encode()).decode()}


def patient(name="p1", **more):
    given = {"gender": "female", "birthDate": "1950-03-01"}
    return {"resourceType": "Patient", "id": name, **given, **more}


def encounter(name="e1", of="p1", **more):
    given = {
        "status": "finished",
        "class": {"code": "IMP"},
        "subject": {"reference": f"Patient/{of}"},
        "period": {"start": "2020-01-01T10:00:00Z", "end": "2020-01-05T10:00:00+01:00"},
        "serviceProvider": {"reference": "Organization/north"},
    }
    return {"resourceType": "Encounter", "id": name, **given, **more}


def part(kind, name, **more):
    given = {"subject": {"reference": "Patient/p1"}, "encounter": {"reference": "Encounter/e1"}}
    return {"resourceType": kind, "id": name, **given, **more}


CONDITION = part(
    "Condition", "c1", code=coded(SNOMED, "38341003", "Hypertension"), recordedDate="2020-01-01"
)
DRUG = part(
    "MedicationRequest", "m1", status="active", intent="order", authoredOn="2020-01-02T08:00:00Z",
    medicationCodeableConcept=coded(RXNORM, "11289", "Warfarin"),
)  # fmt: skip
NOTE = {
    "resourceType": "DocumentReference", "id": "d1", "status": "current",
    "type": {"text": "History"}, "subject": {"reference": "Patient/p1"},
    "date": "2020-01-01T11:00:00Z", "content": [{"attachment": packed("Short of breath.")}],
    "context": {"encounter": [{"reference": "Encounter/e1"}]},
}  # fmt: skip
LAB = part(
    "Observation", "o1", status="final", effectiveDateTime="2020-01-01T12:00:00Z",
    code=coded(LOINC, "2160-0", "Creatinine"),
    valueQuantity={"value": 1.2, "unit": "mg/dL", "system": "http://unitsofmeasure.org",
                   "code": "mg/dL"},
)  # fmt: skip
REPORT = part(
    "DiagnosticReport", "r1", status="final", code={"text": "Chest film"},
    issued="2020-01-02T09:00:00Z", conclusion="No infiltrate.",
)  # fmt: skip
WHOLE = (patient(), encounter(), CONDITION, DRUG, NOTE, LAB, REPORT)


def lines(*resources):
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in resources)


def read(folder, wanted=EVERYTHING):
    reader = FhirReader(folder, wanted=wanted)
    return list(reader.encounters()), reader.tally.counts


def changed(resource, **more):
    found = copy.deepcopy(resource)
    for key, value in more.items():
        if value is None:
            del found[key]
        else:
            found[key] = value
    return found


# ---- what is read


def test_an_export_is_read_whole_whatever_its_files_are_called(write_folder):
    folder = write_folder(
        {
            "b.ndjson": lines(patient(), encounter(), NOTE),
            "a.ndjson.gz": lines(CONDITION, DRUG, LAB, REPORT),
            "README.txt": "not read",
        }
    )
    (found,), counts = read(folder)
    assert (found.patient, found.encounter, found.site) == ("p1", "e1", "north")
    assert (found.start, found.end) == (moment(2020, 1, 1, 10), moment(2020, 1, 5, 9))
    assert found.age == pytest.approx(69.84, abs=0.01)
    assert (found.sex, found.died) == ("female", None)
    assert found.where.endswith("b.ndjson:2")
    assert {(n.kind, n.text) for n in found.notes} == {
        ("History", "Short of breath."),
        ("Chest film", "No infiltrate."),
    }
    assert [(c.system, c.code, c.title) for c in found.codes] == [
        ("snomed", "38341003", "Hypertension")
    ]
    assert [(d.system, d.code, d.name, d.start) for d in found.drugs] == [
        ("rxnorm", "11289", "Warfarin", moment(2020, 1, 2, 8))
    ]
    assert [(m.item, m.value, m.unit) for m in found.measurements] == [("2160-0", 1.2, "mg/dL")]
    assert not counts


def test_nobody_is_called(write_folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something wants to call out")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    away = changed(
        NOTE, content=[{"attachment": {"contentType": "text/plain", "url": "http://x/y"}}]
    )
    (found,), counts = read(write_folder({"a.ndjson": lines(patient(), encounter(), away)}))
    assert found.notes == ()
    assert counts == {"documents that stand at an address (nothing is fetched)": 1}


def test_a_page_becomes_its_words_and_plain_text_goes_first(write_folder):
    page = (
        "<html><head><title>x</title></head><body><p>Chest <b>pain</b></p><script>1</script></body>"
    )
    html = changed(NOTE, content=[{"attachment": packed(page, "text/html; charset=utf-8")}])
    both = changed(
        NOTE,
        id="d2",
        content=[{"attachment": packed(page, "text/html")}, {"attachment": packed("plain")}],
    )
    (found,), _ = read(write_folder({"a.ndjson": lines(patient(), encounter(), html, both)}))
    assert [note.text for note in found.notes] == ["Chest pain", "plain"]


def test_ranks_stand_at_the_encounter_and_a_drug_in_a_resource_of_its_own(write_folder):
    ranked = encounter(diagnosis=[{"condition": {"reference": "Condition/c1"}, "rank": 1}])
    bare = changed(CONDITION, encounter=None)
    own = {"resourceType": "Medication", "id": "x", "code": coded(RXNORM, "11289", "Warfarin")}
    drug = changed(
        DRUG, medicationCodeableConcept=None, medicationReference={"reference": "Medication/x"}
    )
    (found,), _ = read(write_folder({"a.ndjson": lines(patient(), ranked, bare, own, drug)}))
    assert [code.rank for code in found.codes] == [1]
    assert [d.name for d in found.drugs] == ["Warfarin"]


def test_several_systems_give_several_codes(write_folder):
    two = changed(
        CONDITION,
        code={"coding": [*coded(SNOMED, "1")["coding"], *coded(ICD, "I10")["coding"]]},
    )
    (found,), _ = read(write_folder({"a.ndjson": lines(patient(), encounter(), two)}))
    assert [(c.system, c.code) for c in found.codes] == [("snomed", "1"), ("icd10", "I10")]


@pytest.mark.parametrize(
    ("more", "died"),
    [
        ({"deceasedBoolean": False}, False),
        ({"deceasedDateTime": "2020-01-03T00:00:00Z"}, True),
        ({"deceasedDateTime": "2020-01-05"}, True),
        ({"deceasedDateTime": "2021-01-05"}, False),
        ({"deceasedBoolean": True}, None),
    ],
)
def test_who_died_in_the_encounter(write_folder, more, died):
    (found,), _ = read(write_folder({"a.ndjson": lines(patient(**more), encounter())}))
    assert found.died is died


def test_a_discharge_to_death_says_so(write_folder):
    dead = encounter(hospitalization={"dischargeDisposition": {"coding": [{"code": "exp"}]}})
    (found,), _ = read(write_folder({"a.ndjson": lines(patient(), dead)}))
    assert found.died is True


def test_wanted_measurements_are_found_by_code_or_name(write_folder):
    folder = write_folder({"a.ndjson": lines(patient(), encounter(), LAB)})
    for name in ("2160-0", "creatinine", "CREATININE"):
        (found,), _ = read(folder, Wanted(measurements=True, items=(Item(name),)))
        assert [m.item for m in found.measurements] == [name]
    (found,), counts = read(folder, Wanted(measurements=True, items=(Item("lactate"),)))
    assert not found.measurements
    assert counts == {"wanted measurements that never occur": 1}


def test_what_one_patient_has_does_not_change_another(write_folder, tmp_path):
    other = [patient("p2"), encounter("e2", "p2")]
    with_it, without = (
        read(folder)[0][-1]
        for folder in (
            write_folder({"a.ndjson": lines(*WHOLE, *other)}),
            beside(tmp_path, lines(*other)),
        )
    )
    assert (with_it.patient, with_it.age, with_it.notes) == (
        without.patient,
        without.age,
        without.notes,
    )


def beside(tmp_path, text):
    """A second folder."""
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "a.ndjson").write_text(text)
    return folder


# ---- planted faults: a clear error


def cut_short(text):
    return gzip.compress(text.encode(), mtime=0)[:-12]


FAULTS = {
    "no file": ({"a.json": "{}"}, Code.DATA_UNREADABLE, "holds no .ndjson"),
    "truncated gzip": ({"a.ndjson.gz": cut_short(lines(*WHOLE))}, Code.DATA_UNREADABLE, "cut short"),
    "no gzip at all": ({"a.ndjson.gz": b"plain"}, Code.DATA_UNREADABLE, "cut short or damaged"),
    "another encoding": (
        {"a.ndjson": lines(patient()).encode() + '{"x": "Süd"}\n'.encode("latin-1")},
        Code.DATA_ENCODING, "a.ndjson:2: is not UTF-8",
    ),
    "half a line": (
        {"a.ndjson": lines(patient(), encounter()) + '{"resourceType": "Cond\n'}, Code.DATA_FORMAT,
        "a.ndjson:3: is not well-formed JSON",
    ),
    "NaN": ({"a.ndjson": '{"resourceType": "Patient", "id": NaN}\n'}, Code.DATA_FORMAT, ":1: is not well"),
    "deep nesting": (
        {"a.ndjson": '{"resourceType": "Patient", "x": ' + "[" * 99_999 + "\n"}, Code.DATA_FORMAT,
        ":1: is not well-formed",
    ),
    "no resource": ({"a.ndjson": '{"id": "Patient"}\n' + lines(*WHOLE)}, Code.DATA_FORMAT, "not a FHIR resource"),
    "a list": ({"a.ndjson": lines(*WHOLE) + "[1]\n"}, Code.DATA_FORMAT, ":8: is not a FHIR"),
    "a bundle": ({"a.ndjson": lines(*WHOLE, {"resourceType": "Bundle"})}, Code.DATA_FORMAT, "is a Bundle"),
    "a line of 5 MiB": (
        {"a.ndjson": lines(*WHOLE, part("Condition", "x" * 5_000_000))}, Code.DATA_TOO_LONG, ":8: is longer",
    ),
}  # fmt: skip
WRONG = {
    "no patients": ((encounter(),), None),
    "R5's class": ((patient(), encounter(**{"class": [{"code": "IMP"}]})), "Encounter.class is a list"),
    "R5's medication": (
        (patient(), encounter(), changed(DRUG, medication={"concept": {}})), "medication is of FHIR R5",
    ),
    "an id that is none": ((patient(name=7), encounter()), "Patient.id is not text"),
    "no id": ((changed(patient(), id=None), encounter()), "Patient.id is missing"),
    "an id without end": ((patient("x" * 300), encounter()), "Patient.id is longer than 256"),
    "half a character": ((patient("\ud800"), encounter()), "holds half a character"),
    "a birth in words": ((patient(birthDate=CANARY), encounter()), "birthDate is not a date"),
    "a birth on no day": ((patient(birthDate="1950-02-30"), encounter()), "birthDate is not"),
    "a start in words": (
        (patient(), encounter(period={"start": CANARY})), "period.start is not a time as FHIR",
    ),
    "a 25th hour": (
        (patient(), encounter(period={"start": "2020-01-01T25:00:00Z"})), "not a time of the calendar",
    ),
    "a period that is text": ((patient(), encounter(period=CANARY)), "Encounter.period is not an object"),
    "a subject that is text": ((patient(), encounter(subject=CANARY)), "subject is not an object"),
    "codings that are no list": (
        (patient(), encounter(), changed(CONDITION, code={"coding": {"code": CANARY}})),
        "code.coding is not a list of objects",
    ),
    "a value in words": (
        (patient(), encounter(), changed(LAB, valueQuantity={"value": CANARY})), "value is not a number",
    ),
    "an endless value": (
        (patient(), encounter(), changed(LAB, valueQuantity={"value": 10**400})), "is not a finite number",
    ),
    "dead or not": ((patient(deceasedBoolean="no"), encounter()), "is neither true nor false"),
    "no base64": (
        (patient(), encounter(), changed(NOTE, content=[{"attachment": {
            "contentType": "text/plain", "data": "%%%"}}])), "data is not base64",
    ),
    "an unknown character set": (
        (patient(), encounter(), changed(NOTE, content=[{"attachment": packed(
            CANARY, "text/plain; charset=klingon")}])), "names a character set",
    ),
    "a wrong character set": (
        (patient(), encounter(), changed(NOTE, content=[{"attachment": {
            "contentType": "text/plain", "data": base64.b64encode(b"\xff\xfe\xff").decode()}}])),
        "is not text in the character set",
    ),
    "two patients, one id": ((patient(), patient(gender="male"), encounter()), "says something else"),
    "two encounters, one id": ((patient(), patient("p2"), encounter(), encounter(of="p2")), "says something else"),
}  # fmt: skip


def refused(folder):
    with pytest.raises(DataError) as caught:
        read(folder)
    assert CANARY not in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_read_is_named(name, write_folder):
    files, code, told = FAULTS[name]
    error = refused(write_folder(files))
    assert error.code is code
    assert told in error.message


@pytest.mark.parametrize("name", WRONG)
def test_a_resource_that_is_wrong_is_named_by_line_and_element(name, write_folder):
    resources, told = WRONG[name]
    error = refused(write_folder({"a.ndjson": lines(*resources)}))
    if told is not None:
        assert told in error.message
        assert "a.ndjson:" in error.message


# ---- planted faults: a counted drop

DROPS = {
    "encounters of an unknown patient": (*WHOLE, encounter("e2", "nobody")),
    "encounters without a patient": (*WHOLE, changed(encounter("e2"), subject=None)),
    "encounters that did not take place, or are entered in error": (
        *WHOLE, encounter("e2", status="cancelled"),
    ),
    "encounters that end before they begin": (
        *WHOLE, encounter("e2", period={"start": "2020-01-05", "end": "2020-01-01"}),
    ),
    "encounters that come again (the first is kept)": (*WHOLE, encounter()),
    "patients that come again (the first is kept)": (*WHOLE, patient()),
    "conditions that come again (the first is kept)": (*WHOLE, CONDITION),
    "conditions whose encounter cannot be resolved": (
        *WHOLE, changed(CONDITION, id="c2", encounter={"reference": "Encounter?identifier=x|1"}),
    ),
    "conditions without a patient": (*WHOLE, changed(CONDITION, id="c2", subject=None)),
    "conditions without a code": (*WHOLE, changed(CONDITION, id="c2", code=None)),
    "conditions coded in no known system (kept by name)": (
        *WHOLE, changed(CONDITION, id="c2", code=coded("urn:own", "7", "Gout")),
    ),
    "conditions entered in error or refuted": (
        *WHOLE, changed(CONDITION, id="c2", verificationStatus=coded("x", "refuted")),
    ),
    "medication requests cancelled, not done or entered in error": (
        *WHOLE, changed(DRUG, id="m2", status="cancelled"),
    ),
    "medication requests that are no orders": (*WHOLE, changed(DRUG, id="m2", intent="plan")),
    "medication requests whose drug cannot be resolved": (
        *WHOLE, changed(DRUG, id="m2", medicationCodeableConcept=None),
    ),
    "documents entered in error or cancelled": (
        *WHOLE, changed(NOTE, id="d2", status="entered-in-error"),
    ),
    "documents that are neither plain text nor HTML": (
        *WHOLE, changed(NOTE, id="d2", content=[{"attachment": packed("x", "application/pdf")}]),
    ),
    "documents whose text is empty": (
        *WHOLE, changed(NOTE, id="d2", content=[{"attachment": packed("  ")}]),
    ),
    "documents without an attachment": (*WHOLE, changed(NOTE, id="d2", content=None)),
    "documents longer than 4 MiB": (
        *WHOLE, changed(NOTE, id="d2", content=[{"attachment": packed("x" * 4_000_000)}]),
    ),
    "reports without text": (*WHOLE, changed(REPORT, id="r2", conclusion=None)),
    "observations entered in error or cancelled": (
        *WHOLE, changed(LAB, id="o2", status="entered-in-error"),
    ),
    "observations without a number": (
        *WHOLE, changed(LAB, id="o2", valueQuantity=None, valueString="high"),
    ),
    "measurements below or above a bound (the bound is kept)": (
        *WHOLE, changed(LAB, id="o2", valueQuantity={
            "value": 9, "unit": "mg/dL", "comparator": "<"}),
    ),
    "resources of a kind that is not read": (*WHOLE, {"resourceType": "Claim", "id": "x"}),
    "times without a zone (taken as UTC)": (
        *WHOLE, encounter("e2", period={"start": "2020-01-01T10:00:00", "end": "2020-01-02"}),
    ),
    "times that do not say the day (taken as unknown)": (
        *WHOLE, encounter("e2", period={"start": "2020-01", "end": "2020-01-02"}),
    ),
    "birth dates without a day (the middle is taken)": (
        *WHOLE, patient("p2", birthDate="1950"), encounter("e2", "p2"),
    ),
    "impossible ages (taken as unknown)": (
        *WHOLE, patient("p2", birthDate="2030-01-01"), encounter("e2", "p2"),
    ),
    "circles of encounters that are part of themselves (kept)": (
        *WHOLE, encounter("e2", partOf={"reference": "Encounter/e3"}),
        encounter("e3", partOf={"reference": "Encounter/e2"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", DROPS)
def test_what_is_left_out_is_counted(reason, write_folder, tmp_path):
    _, before = read(beside(tmp_path, lines(*WHOLE)))
    _, counts = read(write_folder({"a.ndjson": lines(*DROPS[reason])}))
    assert counts[reason] == 1
    assert not before[reason], "control: without the fault nothing is counted"
    assert CANARY not in " ".join(counts)


def test_ages_above_89_are_90(write_folder):
    old = lines(patient(birthDate="1925-01-01"), encounter())
    (found,), _ = read(write_folder({"a.ndjson": old}))
    assert found.age == 90


# ---- real exports


def test_the_synthea_export_is_read_whole(shared):
    found, counts = read(shared("synthea_fhir_10"))
    assert len(found) == 1215
    assert len({one.patient for one in found}) == 13
    assert sum(len(one.notes) for one in found) == 1215
    assert sum(len(one.codes) for one in found) >= 555
    assert sum(len(one.drugs) for one in found) == 1745
    assert set(counts) == {"resources of a kind that is not read"}


def test_its_encounters_become_cases(shared):
    rules = CaseRules.model_validate(
        {
            "label": {
                "kind": "codes",
                "source": "drugs",
                "rank": "any",
                "several": "all",
                "map": [
                    {"label": "simvastatin", "system": "rxnorm", "codes": ["314231"]},
                    {"label": "other", "system": "rxnorm", "codes": ["310798"]},
                ],
            },
            "codes": {"diagnoses": ["snomed"]},
            "notes": {},
        }
    )
    make = CaseMaker(rules)
    reader = FhirReader(shared("synthea_fhir_10"), wanted=wanted_of(rules))
    records = list(records_of(reader.encounters(), make))
    assert records
    told = Counter(label for record in records for label in record.labels)
    assert set(told) <= {"simvastatin", "other"}
    assert all(code.startswith("snomed:") for record in records for code in record.codes)
