"""MIMIC folders: what a reader makes of them, and what it makes of what is wrong with them."""

from __future__ import annotations

import gzip
import tracemalloc
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from client.data.encounters import Reader
from client.data.readers.files import Folder, Item, Wanted
from client.data.readers.mimic import MimicReader
from common.errors import Code, DataError

CANARY = "canary-7f3a"
EVERYTHING = Wanted(notes=True, codes=True, drugs=True, measurements=True)

THIRD = {
    "PATIENTS.csv": "ROW_ID,SUBJECT_ID,GENDER,DOB\n1,10,F,2080-01-01 00:00:00\n2,20,M,1850-01-01 00:00:00\n",
    "ADMISSIONS.csv": (
        "ROW_ID,SUBJECT_ID,HADM_ID,ADMITTIME,DISCHTIME,DIAGNOSIS,HOSPITAL_EXPIRE_FLAG\n"
        "1,10,100,2150-01-01 08:00:00,2150-01-05 12:00:00,SEPSIS,0\n"
        "2,20,200,2150-06-01 08:00:00,2150-06-03 12:00:00,,1\n"
    ),
    "DIAGNOSES_ICD.csv": (
        "ROW_ID,SUBJECT_ID,HADM_ID,SEQ_NUM,ICD9_CODE\n"
        "1,10,100,1,0389\n2,10,100,2,V4581\n3,20,200,1,E8500\n4,20,200,2,41071\n"
    ),
    "D_ICD_DIAGNOSES.csv": (
        "ROW_ID,ICD9_CODE,SHORT_TITLE,LONG_TITLE\n"
        "1,0389,Septicemia NOS,Unspecified septicemia\n2,V4581,Aortocoronary bypass,Aortocoronary bypass status\n"
        "3,E8500,Acc poison,Accidental poisoning by heroin\n4,41071,Subendo infarct,Subendocardial infarction\n"
    ),
    "PRESCRIPTIONS.csv": (
        "ROW_ID,SUBJECT_ID,HADM_ID,STARTDATE,ENDDATE,DRUG_TYPE,DRUG,NDC\n"
        "1,10,100,2150-01-01 00:00:00,2150-01-02 00:00:00,MAIN,Bisacodyl,00536338101\n"
        "2,10,100,2150-01-01 00:00:00,,BASE,D5W,0\n"
    ),
    "D_LABITEMS.csv": (
        "ROW_ID,ITEMID,LABEL,FLUID,CATEGORY\n"
        "1,50912,Creatinine,Blood,Chemistry\n2,51082,Creatinine,Urine,Chemistry\n3,50971,Potassium,Blood,Chemistry\n"
    ),
    "LABEVENTS.csv": (
        "ROW_ID,SUBJECT_ID,HADM_ID,ITEMID,CHARTTIME,VALUE,VALUENUM,VALUEUOM,FLAG\n"
        "1,10,100,50912,2150-01-01 09:00:00,1.1,1.1,mg/dL,\n"
        "2,10,100,50971,2150-01-03 09:00:00,4,4,mEq/L,\n"
        "3,20,200,51082,2150-06-01 09:00:00,80,80,mg/dL,\n"
    ),
    "NOTEEVENTS.csv": (
        "ROW_ID,SUBJECT_ID,HADM_ID,CHARTDATE,CHARTTIME,CATEGORY,DESCRIPTION,ISERROR,TEXT\n"
        '1,10,100,2150-01-05,,Discharge summary,Report,,"Seen.\nWell, and ""home""."\n'
        "2,10,100,2150-01-02,2150-01-02 10:00:00,Physician ,Report,,Fever.\n"
        "3,10,100,2150-01-02,2150-01-02 10:00:00,Nursing,Report,1,Wrong patient.\n"
    ),
}
FOURTH = {
    "hosp/patients.csv.gz": "subject_id,gender,anchor_age,anchor_year\n10,F,70,2150\n20,M,91,2150\n",
    "hosp/admissions.csv.gz": (
        "subject_id,hadm_id,admittime,dischtime,hospital_expire_flag\n"
        "10,100,2152-01-01 08:00:00,2152-01-05 12:00:00,0\n20,200,2150-06-01 08:00:00,2150-06-03 12:00:00,1\n"
    ),
    "hosp/diagnoses_icd.csv.gz": (
        "subject_id,hadm_id,seq_num,icd_code,icd_version\n10,100,1,0389,9\n10,100,2,A419,10\n20,200,1,I214,10\n"
    ),
    "hosp/prescriptions.csv.gz": (
        "subject_id,hadm_id,starttime,stoptime,drug_type,drug,ndc\n"
        "10,100,2152-01-01 10:00:00,2152-01-02 10:00:00,MAIN,Bisacodyl,00536338101\n"
    ),
    "hosp/d_labitems.csv.gz": "itemid,label,fluid,category\n50912,Creatinine,Blood,Chemistry\n",
    "hosp/labevents.csv.gz": (
        "labevent_id,subject_id,hadm_id,itemid,charttime,value,valuenum,valueuom\n"
        "1,10,100,50912,2152-01-01 09:00:00,1.1,1.1,mg/dL\n"
    ),
    "icu/d_items.csv.gz": (
        "itemid,label,linksto\n220045,Heart Rate,chartevents\n220615,Creatinine,chartevents\n5,Tube,datetimeevents\n"
    ),
    "icu/chartevents.csv.gz": (
        "subject_id,hadm_id,stay_id,itemid,charttime,value,valuenum,valueuom,warning\n"
        "10,100,1,220045,2152-01-01 10:00:00,80,80,bpm,0\n10,100,1,220615,2152-01-01 10:00:00,1.2,1.2,mg/dL,0\n"
    ),
    "note/discharge.csv.gz": (
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
        "10-DS-1,10,100,DS,1,2152-01-05 12:00:00,2152-01-06 12:00:00,Went home.\n"
    ),
    "note/radiology.csv.gz": (
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text\n"
        "10-RR-1,10,100,RR,1,2152-01-02 12:00:00,,Clear lungs.\n10-RR-2,10,,RR,2,2151-01-02 12:00:00,,Before.\n"
    ),
}


at = datetime.fromisoformat


def read(folder, wanted=EVERYTHING):
    reader = MimicReader(folder, wanted=wanted)
    return list(reader.encounters()), reader.tally.counts


def edited(files, name, old, new):
    """`files` with one piece of a text changed; it must be there."""
    assert old in files[name]
    return {**files, name: files[name].replace(old, new)}


def added(files, name, rows):
    return {**files, name: files[name] + rows}


# ---- what is read


def test_mimic_iii_is_read_whole(write_folder):
    (first, second), counts = read(write_folder(THIRD))
    assert (first.patient, first.encounter, first.site) == ("10", "100", None)
    assert (first.start, first.end) == (at("2150-01-01 08:00:00"), at("2150-01-05 12:00:00"))
    assert first.age == pytest.approx(70, abs=0.01)
    assert (first.sex, first.died) == ("female", False)
    assert (second.age, second.sex, second.died) == (90.0, "male", True)
    assert [(code.system, code.code, code.rank, code.title) for code in first.codes] == [
        ("icd9", "0389", 1, "Unspecified septicemia"),
        ("icd9", "V4581", 2, "Aortocoronary bypass status"),
    ]
    assert [(drug.system, drug.code, drug.name) for drug in first.drugs] == [
        ("ndc", "00536338101", "Bisacodyl"),
        ("name", "D5W", "D5W"),
    ]
    assert (first.drugs[0].stop, first.drugs[1].stop) == (at("2150-01-02 00:00:00"), None)
    assert [(note.kind, note.text) for note in first.notes] == [
        ("Physician", "Fever."),
        ("Discharge summary", 'Seen.\nWell, and "home".'),
    ]
    assert [(m.item, m.value, m.unit, m.time) for m in first.measurements] == [
        ("Creatinine (Blood)", 1.1, "mg/dL", at("2150-01-01 09:00:00")),
        ("Potassium (Blood)", 4.0, "mEq/L", at("2150-01-03 09:00:00")),
    ]
    assert second.where.endswith("ADMISSIONS.csv:3")
    assert counts == {"notes marked as errors": 1, "drugs without a code (the name is kept)": 1}


def test_mimic_iv_is_read_whole(write_folder):
    (first, second), counts = read(write_folder(FOURTH))
    assert (first.age, second.age) == (72.0, 90.0)
    assert [(code.system, code.code) for code in first.codes] == [
        ("icd9", "0389"),
        ("icd10", "A419"),
    ]
    assert [(note.kind, note.text) for note in first.notes] == [
        ("Radiology", "Clear lungs."),
        ("Discharge summary", "Went home."),
    ]
    assert [measured.item for measured in first.measurements] == [
        "Creatinine (Blood)",
        "Heart Rate (chart)",
        "Creatinine (chart)",
    ]
    assert first.drugs[0].start == at("2152-01-01 10:00:00")
    assert counts == {"notes outside any encounter": 1}


def test_the_version_shows_in_the_patients_table_and_not_in_where_the_files_lie(write_folder):
    flat = {name.split("/")[1]: text for name, text in FOURTH.items()}
    reader = MimicReader(write_folder(flat), wanted=EVERYTHING)
    port: Reader = reader
    assert reader.version == 4
    assert len(list(port.encounters())) == 2


def test_mixed_case_byte_order_marks_line_ends_and_unknown_columns_do_not_matter(write_folder):
    expected, _ = read(write_folder(THIRD))
    folder = expected[0].file.rsplit("/", 1)[0] + "-other"
    other = {
        "Admissions.CSV.GZ": THIRD["ADMISSIONS.csv"],
        "patients.csv": "\ufeff" + THIRD["PATIENTS.csv"].replace("\n", "\r\n"),
        "Diagnoses_Icd.csv": THIRD["DIAGNOSES_ICD.csv"].replace("ICD9_CODE", '"icd9_code"'),
        **{name.lower(): THIRD[name] for name in list(THIRD)[3:]},
    }
    root = Path(folder)
    root.mkdir()
    for name, text in other.items():
        data = text.encode()
        (root / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    again, _ = read(root)
    assert [replace(entry, file="") for entry in again] == [
        replace(entry, file="") for entry in expected
    ]


def test_only_the_wanted_items_are_kept_under_the_study_s_names(write_folder):
    wanted = Wanted(measurements=True, items=(Item("creatinine (BLOOD)"), Item("50971")))
    (first, second), _ = read(write_folder(THIRD), wanted)
    assert [m.item for m in first.measurements] == ["creatinine (BLOOD)", "50971"]
    assert not second.measurements
    assert not first.notes


def test_the_laboratory_has_a_name_before_the_charts_and_a_suffix_tells_them_apart(write_folder):
    wanted = Wanted(measurements=True, items=(Item("Creatinine"), Item("Creatinine (chart)")))
    (first, _), _ = read(write_folder(FOURTH), wanted)
    assert [(m.item, m.value) for m in first.measurements] == [
        ("Creatinine", 1.1),
        ("Creatinine (chart)", 1.2),
    ]


def test_measurements_after_the_hours_wanted_are_left_out_and_counted(write_folder):
    wanted = Wanted(measurements=True, hours=24)
    (first, _), counts = read(write_folder(THIRD), wanted)
    assert [m.item for m in first.measurements] == ["Creatinine (Blood)"]
    assert counts == {"measurements outside the hours wanted": 1}


def test_the_admission_diagnosis_is_given_when_asked_for(write_folder):
    wanted = Wanted(codes=True, admission_diagnosis=True)
    (first, second), _ = read(write_folder(THIRD), wanted)
    assert (first.codes[0].system, first.codes[0].code, first.codes[0].rank) == (
        "name",
        "SEPSIS",
        None,
    )
    assert len(second.codes) == 2


def test_a_note_without_an_hour_was_written_at_the_end_of_its_day(write_folder):
    (first, _), _ = read(write_folder(THIRD), Wanted(notes=True, categories=("discharge SUMMARY",)))
    assert [note.time for note in first.notes] == [at("2150-01-05 23:59:59")]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_earliest_notes_are_kept_in_whatever_order_they_stand(write_folder, order):
    head = THIRD["NOTEEVENTS.csv"].split("\n", 1)[0] + "\n"
    rows = [
        f"{day},10,100,,2150-01-0{day} 10:00:00,Nursing,,,{'abc'[day - 1] * 10}\n"
        for day in (1, 2, 3)
    ]
    files = {**THIRD, "NOTEEVENTS.csv": head + "".join(rows[place] for place in order)}
    (first, _), counts = read(
        write_folder(files), Wanted(notes=True, most_notes=2, most_characters=15)
    )
    assert [note.text for note in first.notes] == ["a" * 10, "b" * 5]
    assert sum(counts.values()) >= 2


def test_reading_twice_gives_the_same_and_counts_once(write_folder):
    reader = MimicReader(write_folder(THIRD), wanted=EVERYTHING)
    first = list(reader.encounters())
    counts = dict(reader.tally.counts)
    assert list(reader.encounters()) == first
    assert reader.tally.counts == counts


def test_the_demo_is_read_to_the_last_row(shared):
    wanted = Wanted(codes=True, drugs=True, measurements=True)
    encounters, counts = read(shared("mimic_demo"), wanted)
    assert (len(encounters), len({entry.patient for entry in encounters})) == (129, 100)
    assert sum(len(entry.codes) for entry in encounters) == 1761
    assert sum(entry.codes[0].rank == 1 for entry in encounters) == 129
    assert sum(len(entry.drugs) for entry in encounters) == 10398
    kept = sum(len(entry.measurements) for entry in encounters)
    outside, worded = (
        counts["lab results outside any encounter"],
        counts["lab results without a number"],
    )
    assert (kept, outside, worded) == (54485, 14262, 7327)
    assert kept + outside + worded == 76074
    assert Counter(entry.died for entry in encounters) == {False: 89, True: 40}
    assert sum(entry.age == 90 for entry in encounters) == 9
    assert counts["drugs without a code (the name is kept)"] == 1478
    ndc = [drug.code for entry in encounters for drug in entry.drugs if drug.system == "ndc"]
    assert len(ndc) == 8920
    assert {len(code) for code in ndc} == {11}


def test_a_mixture_of_units_in_the_demo_is_left_out_once_a_unit_is_named(shared):
    free = Wanted(measurements=True, items=(Item("PT"),))
    bound = Wanted(measurements=True, items=(Item("PT", unit="SEC"),))
    mixed, counted = read(shared("mimic_demo"), free)
    plain, dropped = read(shared("mimic_demo"), bound)
    units = Counter(m.unit for entry in mixed for m in entry.measurements)
    assert units == {"sec": 1047, "SECONDS": 56}
    assert counted["measurements in another unit than the item's first (kept)"] == 56
    assert {m.unit for entry in plain for m in entry.measurements} == {"sec"}
    assert dropped["measurements in another unit than the one wanted"] == 56


def test_the_demo_without_notes_says_which_table_is_missing(shared):
    with pytest.raises(DataError) as caught:
        read(shared("mimic_demo"), Wanted(notes=True))
    assert caught.value.code is Code.DATA_UNREADABLE
    assert "noteevents" in caught.value.message


# ---- what is wrong and is refused

HEAD = {name: text.split("\n", 1)[0] + "\n" for name, text in THIRD.items()}
PACKED = gzip.compress(
    THIRD["LABEVENTS.csv"].encode() + b"9,10,100,50912,,1,1,mg/dL,\n" * 9999, mtime=0
)
LATIN = THIRD["PRESCRIPTIONS.csv"].encode() + f"3,10,100,,,MAIN,{CANARY} Gel\xe9e,\n".encode(
    "latin-1"
)
QUOTE = f'3,10,100,,,MAIN,"{CANARY},0\n'

REFUSED = {
    "a table that is missing": (
        {**THIRD, "PRESCRIPTIONS.csv": None},
        Code.DATA_UNREADABLE,
        "prescriptions",
    ),
    "a table of a slightly wrong name": (
        {**THIRD, "DIAGNOSES_ICD.csv": None, "DIAGNOSIS_ICD.csv": THIRD["DIAGNOSES_ICD.csv"]},
        Code.DATA_UNREADABLE,
        "did you mean to rename DIAGNOSIS_ICD.csv?",
    ),
    "a table in two spellings": (
        {**THIRD, "admissions.csv.gz": THIRD["ADMISSIONS.csv"]},
        Code.DATA_FORMAT,
        "the table admissions is there twice",
    ),
    "a column of a slightly wrong name": (
        edited(THIRD, "DIAGNOSES_ICD.csv", "ICD9_CODE", "ICD_CODE"),
        Code.DATA_COLUMNS,
        "DIAGNOSES_ICD.csv:1: there is no column icd9_code among 5 (did you mean icd_code?)",
    ),
    "a column twice": (
        edited(THIRD, "DIAGNOSES_ICD.csv", "ROW_ID", "hadm_id"),
        Code.DATA_COLUMNS,
        "DIAGNOSES_ICD.csv:1: column hadm_id is there twice",
    ),
    "no column that tells the version": (
        edited(THIRD, "PATIENTS.csv", "DOB", "BORN"),
        Code.DATA_COLUMNS,
        "PATIENTS.csv:1: there is no column dob",
    ),
    "semicolons": (
        {**THIRD, "ADMISSIONS.csv": THIRD["ADMISSIONS.csv"].replace(",", ";")},
        Code.DATA_COLUMNS,
        "separated by something else than a comma",
    ),
    "another encoding": (
        {**THIRD, "PRESCRIPTIONS.csv": LATIN},
        Code.DATA_ENCODING,
        "PRESCRIPTIONS.csv:4:",
    ),
    "UTF-16": (
        {**THIRD, "PRESCRIPTIONS.csv": THIRD["PRESCRIPTIONS.csv"].encode("utf-16")},
        Code.DATA_ENCODING,
        "PRESCRIPTIONS.csv:1:",
    ),
    "gzip without its name": (
        {**THIRD, "LABEVENTS.csv": PACKED},
        Code.DATA_FORMAT,
        "LABEVENTS.csv: is a gzip",
    ),
    "a spreadsheet": (
        {**THIRD, "LABEVENTS.csv": b"PK\x03\x04\x14\x00\xff\xfe"},
        Code.DATA_FORMAT,
        "Excel",
    ),
    "gzip in name only": (
        {**THIRD, "LABEVENTS.csv": None, "LABEVENTS.csv.gz": THIRD["LABEVENTS.csv"].encode()},
        Code.DATA_UNREADABLE,
        "LABEVENTS.csv.gz:1: cannot be read from here on",
    ),
    "a gzip file cut short": (
        {**THIRD, "LABEVENTS.csv": None, "LABEVENTS.csv.gz": PACKED[:-20]},
        Code.DATA_UNREADABLE,
        "cannot be read from here on (it is cut short or damaged)",
    ),
    "a ragged row": (
        added(THIRD, "DIAGNOSES_ICD.csv", f"5,20,200,3,41071,{CANARY}\n"),
        Code.DATA_RAGGED,
        "DIAGNOSES_ICD.csv:6: has 6 fields, but the header has 5",
    ),
    "a row cut short": (
        added(THIRD, "NOTEEVENTS.csv", f"9,10,{CANARY}\n"),
        Code.DATA_RAGGED,
        "NOTEEVENTS.csv:6: has 3 fields",
    ),
    "a quote that never ends": (
        added(THIRD, "PRESCRIPTIONS.csv", QUOTE),
        Code.DATA_FORMAT,
        "PRESCRIPTIONS.csv:4: is not well-formed",
    ),
    "a quote that never ends in a long file": (
        added(THIRD, "PRESCRIPTIONS.csv", QUOTE + "4,10,100,,,MAIN,Bisacodyl,0\n" * 160_000),
        Code.DATA_TOO_LONG,
        "PRESCRIPTIONS.csv:4: has a field longer than 4 MiB",
    ),
    "a huge line": (
        added(THIRD, "NOTEEVENTS.csv", f"9,10,100,,,Nursing,,,{CANARY * 400_000}\n"),
        Code.DATA_TOO_LONG,
        "NOTEEVENTS.csv:6: is longer than 4 MiB",
    ),
    "a NUL byte": (
        added(THIRD, "NOTEEVENTS.csv", f"9,10,100,,,Nursing,,,{CANARY}\0\n"),
        Code.DATA_FORMAT,
        "NOTEEVENTS.csv:6: holds a NUL byte",
    ),
    "line ends of old": (
        {**THIRD, "ADMISSIONS.csv": THIRD["ADMISSIONS.csv"].replace("\n", "\r")},
        Code.DATA_FORMAT,
        "ADMISSIONS.csv:1: is not well-formed",
    ),
    "an empty file": ({**THIRD, "ADMISSIONS.csv": ""}, Code.DATA_EMPTY, "ADMISSIONS.csv: is empty"),
    "a header alone": (
        {**THIRD, "ADMISSIONS.csv": HEAD["ADMISSIONS.csv"]},
        Code.DATA_EMPTY,
        "ADMISSIONS.csv: holds no record",
    ),
    "an admission without a patient": (
        added(THIRD, "ADMISSIONS.csv", f"3, ,300,,,{CANARY},0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: column subject_id is empty",
    ),
    "a patient without an id": (
        added(THIRD, "PATIENTS.csv", "3,,F,\n"),
        Code.DATA_VALUE,
        "PATIENTS.csv:4: column subject_id is empty",
    ),
    "an admission without an id": (
        added(THIRD, "ADMISSIONS.csv", f"3,10,,,,{CANARY},0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: column hadm_id is empty",
    ),
    "an admission of two patients": (
        added(THIRD, "ADMISSIONS.csv", f"3,20,100,,,{CANARY},0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: gives the encounter of line 2 to another patient",
    ),
    "a date of another country": (
        added(THIRD, "ADMISSIONS.csv", f"3,10,300,01/13/2150,,{CANARY},0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: column admittime is no date and time",
    ),
    "a date in words": (
        added(THIRD, "ADMISSIONS.csv", f"3,10,300,,{CANARY},,0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: column dischtime is no date and time",
    ),
    "a time with a zone": (
        added(THIRD, "ADMISSIONS.csv", "3,10,300,2150-01-01T08:00:00+08:00,,,0\n"),
        Code.DATA_VALUE,
        "ADMISSIONS.csv:4: column admittime is no date and time",
    ),
    "a birth in words": (
        added(THIRD, "PATIENTS.csv", f"3,30,F,{CANARY}\n"),
        Code.DATA_VALUE,
        "PATIENTS.csv:4: column dob is no date and time",
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


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("Creatinin (Blood)", "did you mean"),
        ("Heart rate of the cook", "no dictionary of measurements"),
        ("Creatinine", "2 specimens"),
    ],
)
def test_an_item_that_is_unknown_or_means_several_is_refused(write_folder, item, says):
    with pytest.raises(DataError) as caught:
        read(write_folder(THIRD), Wanted(measurements=True, items=(Item(item),)))
    assert caught.value.code is Code.DATA_COLUMNS
    assert says in caught.value.message


def test_a_folder_that_is_not_there_or_not_a_folder_is_refused(write_folder):
    folder = write_folder(THIRD)
    for path in (folder / "none", folder / "PATIENTS.csv"):
        with pytest.raises(DataError) as caught:
            MimicReader(path, wanted=EVERYTHING)
        assert caught.value.code is Code.DATA_UNREADABLE


# ---- what is wrong and is counted

LAB = "9,10,{},50912,2150-01-01 09:00:00,x,{},{},\n"
COUNTED = {
    "an admission twice": (
        added(THIRD, "ADMISSIONS.csv", "3,10,100,2151-01-01 08:00:00,,,0\n"),
        "encounters that come again (the first is kept)",
    ),
    "a discharge before the admission": (
        added(THIRD, "ADMISSIONS.csv", "3,10,300,2150-03-02 08:00:00,2150-03-01 08:00:00,,0\n"),
        "encounters that end before they begin",
    ),
    "a row of an admission that is left out": (
        added(
            added(THIRD, "ADMISSIONS.csv", "3,10,300,2150-03-02,2150-03-01,,0\n"),
            "DIAGNOSES_ICD.csv",
            "5,10,300,1,0389\n",
        ),
        "diagnoses of an encounter that is left out",
    ),
    "a patient twice": (
        added(THIRD, "PATIENTS.csv", "3,10,M,2000-01-01\n"),
        "patients that come again (the first is kept)",
    ),
    "an admission of no known patient": (
        added(THIRD, "ADMISSIONS.csv", "3,30,300,2150-03-02,2150-03-03,,0\n"),
        "admissions of a patient who is not among the patients (kept)",
    ),
    "an admission before birth": (
        edited(THIRD, "PATIENTS.csv", "2080-01-01", "2180-01-01"),
        "ages that cannot be (left out)",
    ),
    "an age in words": (
        edited(FOURTH, "hosp/patients.csv.gz", ",70,", f",{CANARY},"),
        "ages that cannot be (left out)",
    ),
    "a diagnosis of an unknown admission": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,999,1,0389\n"),
        "diagnoses of an unknown encounter",
    ),
    "a diagnosis of another patient": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,20,100,3,0389\n"),
        "diagnoses of another patient than the encounter's",
    ),
    "a diagnosis that lost its leading zero": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,3,389\n"),
        "diagnosis codes that lost their leading zeros",
    ),
    "a diagnosis that lost two": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,3,80\n"),
        "diagnosis codes without the shape of their ICD version",
    ),
    "an ICD-10 code where ICD-9 stands": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,3,J189\n"),
        "diagnosis codes without the shape of their ICD version",
    ),
    "an ICD version of no kind": (
        added(FOURTH, "hosp/diagnoses_icd.csv.gz", "10,100,3,A419,11\n"),
        "diagnoses whose ICD version is neither 9 nor 10",
    ),
    "a diagnosis without a code": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,3,\n"),
        "diagnoses without a code",
    ),
    "a diagnosis without a rank": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,first,0389\n"),
        "diagnoses without a rank (kept)",
    ),
    "a code that no dictionary has": (
        added(THIRD, "DIAGNOSES_ICD.csv", "5,10,100,3,99999\n"),
        "diagnosis codes that the dictionary does not have (kept)",
    ),
    "a drug code that lost its zeros": (
        added(THIRD, "PRESCRIPTIONS.csv", "3,10,100,,,MAIN,Bisacodyl,536338101\n"),
        "drug codes that are not eleven digits (the name is kept)",
    ),
    "a drug of neither code nor name": (
        added(THIRD, "PRESCRIPTIONS.csv", "3,10,100,,,MAIN,,\n"),
        "drugs without a code and without a name",
    ),
    "a drug that stops before it starts": (
        added(
            THIRD,
            "PRESCRIPTIONS.csv",
            "3,10,100,2150-01-03,2150-01-02,MAIN,Bisacodyl,00536338101\n",
        ),
        "drugs that stop before they start (kept without the stop)",
    ),
    "a drug's date that is none": (
        added(THIRD, "PRESCRIPTIONS.csv", f"3,10,100,{CANARY},,MAIN,Bisacodyl,00536338101\n"),
        "prescriptions with a time that cannot be read",
    ),
    "a value in words": (
        added(THIRD, "LABEVENTS.csv", LAB.format(100, ">60", "mg/dL")),
        "lab results without a number",
    ),
    "an infinite value": (
        added(THIRD, "LABEVENTS.csv", LAB.format(100, "1e999", "mg/dL")),
        "lab results without a number",
    ),
    "an outpatient's value": (
        added(THIRD, "LABEVENTS.csv", LAB.format("", 1, "mg/dL")),
        "lab results outside any encounter",
    ),
    "another unit": (
        added(THIRD, "LABEVENTS.csv", LAB.format(100, 97, "umol/L")),
        "measurements in another unit than the item's first (kept)",
    ),
    "a value's date that is none": (
        added(THIRD, "LABEVENTS.csv", f"9,10,100,50912,{CANARY},1,1,mg/dL,\n"),
        "lab results with a time that cannot be read",
    ),
    "an item that no dictionary has": (
        added(THIRD, "LABEVENTS.csv", "9,10,100,1,2150-01-01 09:00:00,1,1,mg/dL,\n"),
        "lab results of an item that the dictionary does not have",
    ),
    "a note marked as an error by a spreadsheet": (
        added(THIRD, "NOTEEVENTS.csv", f"9,10,100,,2150-01-01 09:00:00,ECG,,1.0,{CANARY}\n"),
        "notes marked as errors",
    ),
    "a note without text": (
        added(THIRD, "NOTEEVENTS.csv", "9,10,100,,2150-01-01 09:00:00,ECG,,,\n"),
        "notes without text",
    ),
    "a note's date that is none": (
        added(THIRD, "NOTEEVENTS.csv", f"9,10,100,{CANARY},,ECG,,,x\n"),
        "notes with a time that cannot be read",
    ),
    "a table without a record": (
        {**THIRD, "DIAGNOSES_ICD.csv": HEAD["DIAGNOSES_ICD.csv"]},
        "tables that hold no record",
    ),
}


@pytest.mark.parametrize("fault", COUNTED)
def test_a_fault_is_counted_and_nothing_else_changes(write_folder, fault):
    files, reason = COUNTED[fault]
    fine = FOURTH if "hosp/patients.csv.gz" in files else THIRD
    encounters, counts = read(write_folder(files))
    before = (
        {"notes outside any encounter": 1}
        if fine is FOURTH
        else {
            "notes marked as errors": 1,
            "drugs without a code (the name is kept)": 1,
        }
    )
    more = Counter(counts)
    more.subtract(before)
    assert {name: count for name, count in more.items() if count}[reason] == 1
    assert len(encounters) == (3 if fault == "an admission of no known patient" else 2)
    assert CANARY not in repr(counts) + repr(encounters)


def test_what_is_counted_as_dropped_is_not_among_the_encounters(write_folder):
    rows = "5,20,100,3,0389\n6,10,100,3,389\n7,10,999,1,0389\n8,10,100,3,J189\n"
    encounters, _ = read(write_folder(added(THIRD, "DIAGNOSES_ICD.csv", rows)), Wanted(codes=True))
    assert [code.code for entry in encounters for code in entry.codes] == [
        "0389",
        "V4581",
        "E8500",
        "41071",
    ]


def test_entries_beyond_the_most_of_an_encounter_are_counted(write_folder):
    (first, second), counts = read(write_folder(THIRD), Wanted(codes=True, most_entries=1))
    assert [code.code for code in (*first.codes, *second.codes)] == ["0389", "E8500"]
    assert counts == {"entries beyond the number wanted of an encounter": 2}


def test_files_of_a_mac_are_not_taken_for_tables(write_folder):
    folder = write_folder({**THIRD, "._ADMISSIONS.csv": b"\0\5\x16\7"})
    assert len(Folder.scan(folder).tables["admissions"]) == 1
    assert len(read(folder)[0]) == 2


# ---- memory


def _big_notes(path, *, wanted):
    """A note table of about 60 MB, one note in a hundred of an admission that is there."""
    text = ("Patient seen on rounds. " * 120).strip()
    with gzip.open(path, "wb", compresslevel=1) as handle:
        handle.write(HEADER)
        size = len(HEADER)
        for number in range(20_000):
            admission = 100 if wanted or number % 100 == 0 else 999_999
            row = f'{number},10,{admission},,2150-01-02 10:00:00,Nursing,Report,,"{number}\n{text}"\n'.encode()
            size += handle.write(row)
    return size


HEADER = HEAD["NOTEEVENTS.csv"].encode()


@pytest.mark.parametrize("wanted", [False, True])
def test_memory_follows_what_is_wanted_and_not_the_file(write_folder, wanted):
    folder = write_folder({**THIRD, "NOTEEVENTS.csv": None})
    size = _big_notes(folder / "NOTEEVENTS.csv.gz", wanted=wanted)
    assert size > 55_000_000
    reader = MimicReader(folder, wanted=Wanted(notes=True, most_notes=50))
    tracemalloc.start()
    try:
        encounters = list(reader.encounters())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(encounters[0].notes) == 50
    assert peak < 3_000_000


def test_memory_grows_with_what_is_wanted(write_folder):
    """The measurement above sees memory at all: without a most, the notes are there."""
    folder = write_folder({**THIRD, "NOTEEVENTS.csv": None})
    _big_notes(folder / "NOTEEVENTS.csv.gz", wanted=False)
    tracemalloc.start()
    try:
        (first, _), _ = read(folder, Wanted(notes=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(first.notes) == 200
    assert peak > 600_000
