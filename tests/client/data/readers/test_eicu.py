"""eICU folders: what a reader makes of them, and what it makes of what is wrong with them."""

from __future__ import annotations

import gzip
import tracemalloc
from collections import Counter
from datetime import timedelta

import pytest

from client.data.readers.eicu import EPOCH, EicuReader
from client.data.readers.files import Item, Wanted
from common.errors import Code, DataError

CANARY = "canary-7f3a"
EVERYTHING = Wanted(notes=True, codes=True, drugs=True, measurements=True)

FILES = {
    "patient.csv": (
        "patientunitstayid,patienthealthsystemstayid,gender,age,hospitalid,apacheadmissiondx,"
        "hospitaldischargestatus,unitdischargeoffset,uniquepid\n"
        '1,11,Female,87,59,"Rhythm disturbance (atrial, supraventricular)",Alive,2250,002-1\n'
        "2,12,Male,> 89,60,,Expired,600,002-1\n"
        "3,13,,54,60,,,900,002-2\n"
    ),
    "diagnosis.csv": (
        "diagnosisid,patientunitstayid,diagnosisoffset,diagnosisstring,icd9code,diagnosispriority\n"
        '1,1,-30,cardiovascular|hypertension,"401.9, I10",Primary\n'
        '2,1,60,psychiatry|suicidal,"V62.84, R45.851",Major\n'
        "3,2,60,neurologic|altered mental status,,Other\n"
    ),
    "medication.csv": (
        "medicationid,patientunitstayid,drugstartoffset,drugordercancelled,drugname,drughiclseqno,drugstopoffset\n"
        "1,1,-188,No,WARFARIN 5 MG,2812,2739\n2,1,5,Yes,DILTIAZEM,182,10\n3,2,5,No,,182,0\n"
    ),
    "note.csv": (
        "noteid,patientunitstayid,noteoffset,noteenteredoffset,notetype,notepath,notevalue,notetext\n"
        "1,1,1,8,Admission,notes/Progress Notes/Plan/System View,System View,SystemView\n"
        "2,1,1,8,Admission,notes/Progress Notes/Weight/Current,Current,46.5\n"
        "3,1,1,9,CPR,notes/Progress Notes/Outcome/Alive,Alive,Alive\n"
    ),
    "pastHistory.csv.gz": (
        "pasthistoryid,patientunitstayid,pasthistoryoffset,pasthistoryenteredoffset,pasthistorypath,"
        "pasthistoryvalue,pasthistoryvaluetext\n"
        "1,1,1,5,notes/Progress Notes/Past History/Obtain Options/No Health Problems,No Health Problems,NoHealthProblems\n"
    ),
    "lab.csv": (
        "labid,patientunitstayid,labresultoffset,labname,labresult,labmeasurenamesystem\n"
        "1,1,30,creatinine,1.04,mg/dL\n2,1,90,creatinine,1.1,MG/DL\n3,1,90,Temperature,36.9,\n"
    ),
    "vitalPeriodic.csv": (
        "vitalperiodicid,patientunitstayid,observationoffset,temperature,heartrate\n"
        "1,1,5,,80\n2,1,10,37.1,82\n3,2,10,,\n"
    ),
    "vitalAperiodic.csv": (
        "vitalaperiodicid,patientunitstayid,observationoffset,noninvasivemean\n1,1,7,71\n"
    ),
}  # fmt: skip
AFTER = {
    "drugs known by their HICL number alone (kept)": 1,
    "drugs that stop before they start (kept without the stop)": 1,
    "drugs whose order was cancelled": 1,
    "diagnoses without a code (the name is kept)": 1,
    "patients who were in several hospitals (kept)": 1,
}
LAST = "3,13,,54,60,,,900,002-2\n"


def read(folder, wanted=EVERYTHING):
    reader = EicuReader(folder, wanted=wanted)
    return list(reader.encounters()), reader.tally.counts


def after(minutes):
    return EPOCH + timedelta(minutes=minutes)


def edited(name, old, new):
    assert old in FILES[name]
    return {**FILES, name: FILES[name].replace(old, new)}


def added(name, rows):
    return {**FILES, name: FILES[name] + rows}


# ---- what is read


def test_a_folder_is_read_whole(write_folder):
    (first, second, third), counts = read(write_folder(FILES))
    assert (first.patient, first.encounter, first.site) == ("002-1", "1", "59")
    assert (first.start, first.end) == (EPOCH, after(2250))
    assert (first.age, first.sex, first.died) == (87.0, "female", False)
    assert (second.age, second.sex, second.died) == (90.0, "male", True)
    assert (third.age, third.sex, third.died) == (54.0, None, None)
    assert [(code.system, code.code, code.rank, code.time) for code in first.codes] == [
        ("icd9", "401.9", 1, after(-30)),
        ("icd10", "I10", 1, after(-30)),
        ("icd9", "V62.84", 2, after(60)),
        ("icd10", "R45.851", 2, after(60)),
    ]
    (kept,) = second.codes
    assert (kept.system, kept.code, kept.rank) == ("name", "neurologic|altered mental status", 3)
    (drug,) = first.drugs
    assert (drug.system, drug.code, drug.name) == ("name", "WARFARIN 5 MG", "WARFARIN 5 MG")
    assert (drug.start, drug.stop) == (after(-188), after(2739))
    assert [(drug.code, drug.name, drug.stop) for drug in second.drugs] == [("HICL 182", "", None)]
    assert counts == AFTER


def test_lines_entered_at_one_time_in_one_kind_are_one_note(write_folder):
    (first, _, _), _ = read(write_folder(FILES))
    assert [(note.kind, note.time, note.text) for note in first.notes] == [
        ("Past history", after(5), "Past History/Obtain Options: No Health Problems"),
        ("Admission", after(8), "Plan: System View\nWeight: Current 46.5"),
        ("CPR", after(9), "Outcome: Alive"),
    ]


def test_only_the_wanted_kinds_of_notes_are_kept(write_folder):
    (first, _, _), _ = read(write_folder(FILES), Wanted(notes=True, categories=("cpr",)))
    assert [note.kind for note in first.notes] == ["CPR"]


def test_results_and_vital_signs_are_measurements(write_folder):
    (first, _, _), _ = read(write_folder(FILES))
    assert [(m.item, m.value, m.unit, m.time) for m in first.measurements] == [
        ("creatinine (lab)", 1.04, "mg/dL", after(30)),
        ("creatinine (lab)", 1.1, "MG/DL", after(90)),
        ("Temperature (lab)", 36.9, "", after(90)),
        ("heartrate", 80.0, "", after(5)),
        ("temperature", 37.1, "", after(10)),
        ("heartrate", 82.0, "", after(10)),
        ("noninvasivemean", 71.0, "", after(7)),
    ]


def test_a_vital_sign_has_a_name_before_the_laboratory_and_a_suffix_tells_them_apart(write_folder):
    items = (Item("Temperature"), Item("temperature (LAB)"), Item("Creatinine", unit="mg/dl"))
    (first, _, _), counts = read(write_folder(FILES), Wanted(measurements=True, items=items))
    assert [(m.item, m.value) for m in first.measurements] == [
        ("Creatinine", 1.04),
        ("Creatinine", 1.1),
        ("temperature (LAB)", 36.9),
        ("Temperature", 37.1),
    ]
    assert counts == {"patients who were in several hospitals (kept)": 1}


def test_a_patient_in_two_hospitals_stays_one_patient(write_folder):
    (first, second, third), _ = read(write_folder(FILES))
    assert first.patient == second.patient != third.patient
    assert first.site != second.site


def test_the_admission_diagnosis_is_given_when_asked_for(write_folder):
    (first, second, _), _ = read(write_folder(FILES), Wanted(codes=True, admission_diagnosis=True))
    assert first.codes[0].code == "Rhythm disturbance (atrial, supraventricular)"
    assert (first.codes[0].system, first.codes[0].rank, first.codes[0].time) == (
        "name",
        None,
        EPOCH,
    )
    assert len(second.codes) == 1


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("401.9, I10", ["icd9", "icd10"]),
        ("I10", ["icd10"]),
        ("V08, Z21", ["icd9", "icd10"]),
        ("038.9, 518.81, A41.9, V43.52XA", ["icd9", "icd9", "icd10", "icd10"]),
        ("E850.3, T40.1X1A", ["icd9", "icd10"]),
        ("", ["name"]),
    ],
)
def test_a_cell_of_codes_is_told_apart_by_shape_and_then_by_order(write_folder, cell, expected):
    files = edited("diagnosis.csv", '"401.9, I10",Primary', f'"{cell}",Primary')
    (first, _, _), _ = read(write_folder(files), Wanted(codes=True))
    assert [code.system for code in first.codes if code.rank == 1] == expected


def test_the_earliest_lines_of_notes_are_kept(write_folder):
    wanted = Wanted(notes=True, most_notes=2, most_characters=60)
    (first, _, _), counts = read(write_folder(FILES), wanted)
    assert [note.text for note in first.notes] == [
        "Past History/Obtain Options: No Health Problems",
        "Plan: System ",
    ]
    assert sum(count for reason, count in counts.items() if reason.startswith("notes ")) >= 2


def test_the_demo_is_read_to_the_last_row(shared):
    wanted = Wanted(codes=True, drugs=True, notes=True)
    encounters, counts = read(shared("eicu_demo"), wanted)
    assert len(encounters) == 2520
    assert len({entry.patient for entry in encounters}) == 1841
    assert len({entry.site for entry in encounters}) == 186
    assert counts["patients who were in several hospitals (kept)"] == 19
    assert sum(entry.age == 90 for entry in encounters) == 98
    assert counts["ages that cannot be read (left out)"] == 4
    assert Counter(entry.died for entry in encounters) == {False: 2280, True: 212, None: 28}
    systems = Counter(code.system for entry in encounters for code in entry.codes)
    assert systems == {"icd9": 21515, "icd10": 20586, "name": 3806}
    assert counts["diagnosis codes without the shape of ICD-9 or ICD-10"] == 34
    drugs = sum(len(entry.drugs) for entry in encounters)
    cancelled = counts["drugs whose order was cancelled"]
    nameless = counts["drugs without a code and without a name"]
    assert (drugs, cancelled, nameless) == (71322, 2636, 1646)
    assert drugs + cancelled + nameless == 75604
    lines = sum(note.text.count("\n") + 1 for entry in encounters for note in entry.notes)
    assert lines == 24758 + 12109 + 84058


def test_the_demo_without_measurements_says_which_tables_are_missing(shared):
    with pytest.raises(DataError) as caught:
        read(shared("eicu_demo"), Wanted(measurements=True))
    assert caught.value.code is Code.DATA_UNREADABLE
    assert "lab or vitalperiodic or vitalaperiodic" in caught.value.message


# ---- what is wrong and is refused

PACKED = gzip.compress(
    ("".join(f"{n},1,30,creatinine,1.{n},mg/dL\n" for n in range(9999))).encode(), mtime=0
)

REFUSED = {
    "no table of patients": (
        {**FILES, "patient.csv": None},
        Code.DATA_UNREADABLE,
        "holds no table patient",
    ),
    "MIMIC's table of patients": (
        {**FILES, "patient.csv": None, "patients.csv": "subject_id\n"},
        Code.DATA_UNREADABLE,
        "did you mean to rename patients.csv?",
    ),
    "a table in two spellings": (
        {**FILES, "DIAGNOSIS.csv.gz": FILES["diagnosis.csv"]},
        Code.DATA_FORMAT,
        "the table diagnosis is there twice",
    ),
    "a column of a slightly wrong name": (
        edited("patient.csv", "uniquepid", "unique_pid"),
        Code.DATA_COLUMNS,
        "patient.csv:1: there is no column uniquepid among 9 (did you mean unique_pid?)",
    ),
    "a ragged row": (
        added("medication.csv", f"4,1,5,No,{CANARY}, 5 MG,2812,9\n"),
        Code.DATA_RAGGED,
        "medication.csv:5: has 8 fields, but the header has 7",
    ),
    "another encoding": (
        {
            **FILES,
            "note.csv": FILES["note.csv"].encode()
            + f"4,1,1,9,CPR,{CANARY},\xb0,\xb0\n".encode("latin-1"),
        },
        Code.DATA_ENCODING,
        "note.csv:5: is not UTF-8",
    ),
    "a gzip file cut short": (
        {
            **FILES,
            "lab.csv": None,
            "lab.csv.gz": gzip.compress(FILES["lab.csv"].encode()) + PACKED[:-9],
        },
        Code.DATA_UNREADABLE,
        "cannot be read from here on",
    ),
    "a NUL byte": (
        added("lab.csv", f"4,1,30,{CANARY}\0,1,mg/dL\n"),
        Code.DATA_FORMAT,
        "lab.csv:5: holds a NUL",
    ),
    "a huge cell": (
        added("note.csv", f'4,1,1,9,CPR,"{(CANARY + chr(10)) * 350_000}",,\n'),
        Code.DATA_TOO_LONG,
        "note.csv:5: has a field longer",
    ),
    "an empty file": ({**FILES, "patient.csv": ""}, Code.DATA_EMPTY, "patient.csv: is empty"),
    "a header alone": (
        {**FILES, "patient.csv": FILES["patient.csv"].split("\n")[0]},
        Code.DATA_EMPTY,
        "patient.csv: holds no record",
    ),
    "a stay without a patient": (
        added("patient.csv", f"4,14,Female,50,60,{CANARY},Alive,9,\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column uniquepid is empty",
    ),
    "a stay without an id": (
        added("patient.csv", f",14,Female,50,60,{CANARY},Alive,9,002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column patientunitstayid is empty",
    ),
    "a stay without a hospital": (
        added("patient.csv", f"4,14,Female,50,,{CANARY},Alive,9,002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column hospitalid is empty",
    ),
    "a stay of two patients": (
        added("patient.csv", f"1,14,Female,50,60,{CANARY},Alive,9,002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: gives the encounter of line 2 to another patient",
    ),
    "a hospital stay of two patients": (
        added("patient.csv", f"4,11,Female,50,60,{CANARY},Alive,9,002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column patienthealthsystemstayid gives one hospital stay to two patients",
    ),
    "a discharge in words": (
        added("patient.csv", f"4,14,Female,50,60,,Alive,{CANARY},002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column unitdischargeoffset is no offset in minutes",
    ),
    "a discharge in a thousand years": (
        added("patient.csv", "4,14,Female,50,60,,Alive,1e12,002-3\n"),
        Code.DATA_VALUE,
        "patient.csv:5: column unitdischargeoffset is no offset in minutes",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_is_refused_by_file_and_line_without_the_cell(write_folder, fault):
    files, code, says = REFUSED[fault]
    with pytest.raises(DataError) as caught:
        read(write_folder(files))
    assert caught.value.code is code
    assert says in caught.value.message
    assert CANARY not in caught.value.report()


# ---- what is wrong and is counted

COUNTED = {
    "a stay twice": (
        added("patient.csv", "1,11,Female,50,60,,Alive,9,002-1\n"),
        "encounters that come again (the first is kept)",
    ),
    "a discharge before the admission": (
        added("patient.csv", "4,14,Female,50,60,,Alive,-9,002-3\n"),
        "encounters that end before they begin",
    ),
    "an age in words": (
        edited("patient.csv", LAST, LAST.replace("54", CANARY)),
        "ages that cannot be read (left out)",
    ),
    "a negative age": (
        edited("patient.csv", LAST, LAST.replace("54", "-4")),
        "ages that cannot be read (left out)",
    ),
    "an age of Methuselah": (
        edited("patient.csv", LAST, LAST.replace("54", "169")),
        "ages that cannot be read (left out)",
    ),
    "a diagnosis of an unknown stay": (
        added("diagnosis.csv", "4,9,60,x|y,401.9,Major\n"),
        "diagnoses of an unknown encounter",
    ),
    "a diagnosis without a priority": (
        added("diagnosis.csv", "4,1,60,x|y,401.9,\n"),
        "diagnoses without a rank (kept)",
    ),
    "a diagnosis of nothing": (
        added("diagnosis.csv", "4,1,60,,,Major\n"),
        "diagnoses without a code and without a name",
    ),
    "a code that lost its leading zero": (
        added("diagnosis.csv", '4,1,60,x|y,"38.9, A41.9",Major\n'),
        "diagnosis codes without the shape of ICD-9 or ICD-10",
    ),
    "a diagnosis at no time": (
        added("diagnosis.csv", f"4,1,{CANARY},x|y,401.9,Major\n"),
        "diagnoses with a time that cannot be read",
    ),
    "a drug of neither name nor number": (
        added("medication.csv", "4,1,5,No,,,9\n"),
        "drugs without a code and without a name",
    ),
    "a drug at no time": (
        added("medication.csv", f"4,1,{CANARY},No,WARFARIN,2812,9\n"),
        "drugs with a time that cannot be read",
    ),
    "a drug of an unknown stay": (
        added("medication.csv", "4,9,5,No,WARFARIN,2812,9\n"),
        "drugs of an unknown encounter",
    ),
    "a line of a note at no time": (
        added("note.csv", f"4,1,1,{CANARY},CPR,a/b/c,c,c\n"),
        "lines of notes with a time that cannot be read",
    ),
    "a line of a note that says nothing": (
        added("note.csv", "4,1,1,9,CPR,a/b/c,,\n"),
        "lines of notes without text",
    ),
    "a line of a note of no stay": (
        added("note.csv", "4,,1,9,CPR,a/b/c,c,c\n"),
        "lines of notes outside any encounter",
    ),
    "a result in words": (
        added("lab.csv", f"4,1,30,creatinine,{CANARY},mg/dL\n"),
        "lab results without a number",
    ),
    "a result that is no finite number": (
        added("lab.csv", "4,1,30,creatinine,nan,mg/dL\n"),
        "lab results without a number",
    ),
    "a result in another unit": (
        added("lab.csv", "4,1,30,creatinine,97,umol/L\n"),
        "measurements in another unit than the item's first (kept)",
    ),
    "a result of an unknown stay": (
        added("lab.csv", "4,9,30,creatinine,1,mg/dL\n"),
        "lab results of an unknown encounter",
    ),
    "a result at no time": (
        added("lab.csv", f"4,1,{CANARY},creatinine,1,mg/dL\n"),
        "lab results with a time that cannot be read",
    ),
    "a vital sign in words": (
        added("vitalPeriodic.csv", f"4,1,5,{CANARY},\n"),
        "vital signs without a number",
    ),
    "a vital sign at no time": (
        added("vitalPeriodic.csv", f"4,1,{CANARY},37,\n"),
        "vital signs with a time that cannot be read",
    ),
    "a vital sign of an unknown stay": (
        added("vitalPeriodic.csv", "4,9,5,37,\n"),
        "vital signs of an unknown encounter",
    ),
    "a table without a record": (
        {**FILES, "lab.csv": FILES["lab.csv"].split("\n")[0]},
        "tables that hold no record",
    ),
}


@pytest.mark.parametrize("fault", COUNTED)
def test_a_fault_is_counted_and_nothing_else_changes(write_folder, fault):
    files, reason = COUNTED[fault]
    encounters, counts = read(write_folder(files))
    more = Counter(counts)
    more.subtract(AFTER)
    assert {name: count for name, count in more.items() if count} == {reason: 1}
    assert [entry.encounter for entry in encounters] == ["1", "2", "3"]
    assert CANARY not in repr(counts) + repr(encounters)


def test_a_wanted_measurement_that_never_occurs_is_counted(write_folder):
    wanted = Wanted(measurements=True, items=(Item("creatinin"), Item("icp"), Item("heartrate")))
    _, counts = read(write_folder(FILES), wanted)
    assert counts["wanted measurements that never occur"] == 2


@pytest.mark.parametrize("cell", ["> 89", ">89", " > 89 ", "90", "89.5"])
def test_hidden_and_high_ages_are_ninety_at_most(write_folder, cell):
    (_, second, _), counts = read(write_folder(edited("patient.csv", "> 89", cell)))
    assert second.age == (89.5 if cell == "89.5" else 90.0)
    assert counts == AFTER


# ---- memory


def test_memory_follows_what_is_wanted_and_not_the_file(write_folder):
    folder = write_folder({**FILES, "lab.csv": None})
    with gzip.open(folder / "lab.csv.gz", "wb", compresslevel=1) as handle:
        size = handle.write((FILES["lab.csv"].split("\n")[0] + "\n").encode())
        block = "".join(f"{n},1,{n},potassium,4.{n},mmol/L\n" for n in range(1000)).encode()
        size += sum(handle.write(block) for _ in range(150))
        size += sum(handle.write(block.replace(b"potassium", b"creatinine")) for _ in range(20))
    assert size > 4_000_000
    wanted = Wanted(measurements=True, items=(Item("creatinine"),), most_entries=2_000)
    tracemalloc.start()
    try:
        stream = EicuReader(folder, wanted=wanted).encounters()
        next(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
