import csv
import gzip
import json
import tracemalloc
from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import parquet

from client.data.records import Record, by_patient, require_disjoint
from client.data.tables import TableColumns, file_sha256, read_table, read_tables, take_tables
from common.errors import Code, DataError

COLUMNS = TableColumns(text="text", patient="patient", label="label", site="hospital")
LABELS = ("asthma", "heart failure")
ROWS = [
    ("p1", "wheeze, cough", "asthma", "A"),
    ("p2", 'two\nlines and "quotes"', "heart failure", "B"),
    ("3", "ödem", "asthma", "B"),
]
CANARY = "canary-7f3a"


def _write_csv(path, rows=ROWS, header=("patient", "text", "label", "hospital")):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def _write_ndjson(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as handle:
        for who, text, label, site in ROWS:
            patient = int(who) if who.isdigit() else who
            entry = {"patient": patient, "text": text, "label": label, "hospital": site, "x": 1}
            handle.write(json.dumps(entry) + "\n")
    return path


def _write_parquet(path):
    names = ("patient", "text", "label", "hospital")
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(names)}
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", _write_csv),
        ("a.csv.gz", _write_csv),
        ("a.CSV", _write_csv),
        ("a.ndjson", _write_ndjson),
        ("a.jsonl.gz", _write_ndjson),
        ("a.parquet", _write_parquet),
        ("2024.05.notes.csv", _write_csv),
    ],
)
def test_every_format_gives_the_same_records(name, write, tmp_path):
    path = write(tmp_path / name)
    records = read_table(path, COLUMNS, labels=LABELS)
    assert [(r.patient, r.text, r.label, r.site) for r in records] == ROWS
    assert records[0].file == str(path)


def test_a_record_is_named_by_the_line_it_begins_on(tmp_path):
    lines = [r.line for r in read_table(_write_csv(tmp_path / "a.csv"), COLUMNS, labels=LABELS)]
    assert lines == [2, 3, 5]


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfpatient,text,label\r\n\r\np1,x,asthma\r\n")
    records = read_table(path, TableColumns("text", "patient", "label"), labels=LABELS)
    assert [(r.patient, r.line) for r in records] == [("p1", 3)]


def test_without_a_patient_column_every_row_is_its_own_patient(tmp_path):
    path = _write_csv(tmp_path / "a.csv")
    records = read_table(path, TableColumns("text", None, "label"), labels=LABELS)
    assert len(by_patient(records)) == 3


def test_a_file_to_predict_needs_no_label_and_several_files_are_one_table(tmp_path):
    one, two = _write_csv(tmp_path / "a.csv"), _write_parquet(tmp_path / "b.parquet")
    records = read_tables([one, two], TableColumns("text"), labels=None)
    assert len(records) == 6
    assert {r.label for r in records} == {None}


HEAD = b"patient,text,label,hospital\n"
GOOD = b"p1,x,asthma,A\n"
BAD = {
    "empty.csv": (b"", Code.DATA_EMPTY, ""),
    "header_only.csv": (HEAD, Code.DATA_EMPTY, ""),
    "latin1.csv": (
        HEAD + GOOD + "p1,fi\xe8vre,asthma,A\n".encode("latin-1"),
        Code.DATA_ENCODING,
        ":3",
    ),
    "utf16.csv": ("patient,text\n".encode("utf-16"), Code.DATA_ENCODING, ":1"),
    "typo.csv": (b"patient,txt,label,hospital\n" + GOOD, Code.DATA_COLUMNS, "did you mean txt"),
    "case.csv": (b"patient,Text,label,hospital\n" + GOOD, Code.DATA_COLUMNS, "did you mean Text"),
    "twice.csv": (
        b"patient,text,text,label,hospital\np,x,y,asthma,A\n",
        Code.DATA_COLUMNS,
        "twice",
    ),
    "label.csv": (HEAD + GOOD + b"p2,x,astma,A\n", Code.DATA_LABEL, "did you mean asthma"),
    "label_far.csv": (HEAD + f"p2,x,{CANARY},A\n".encode(), Code.DATA_LABEL, ":2"),
    "no_label.csv": (HEAD + b"p2,x,,A\n", Code.DATA_VALUE, "column label"),
    "no_patient.csv": (HEAD + b" ,x,asthma,A\n", Code.DATA_VALUE, "column patient"),
    "no_text.csv": (HEAD + b'p1,"  ",asthma,A\n', Code.DATA_VALUE, "column text"),
    "ragged.csv": (HEAD + GOOD + f"p1,{CANARY},y,asthma,A\n".encode(), Code.DATA_RAGGED, ":3"),
    "short.csv": (HEAD + b"p1,x\n", Code.DATA_RAGGED, ":2"),
    "quote.csv": (HEAD + b'p1,"never closed,asthma,A\n', Code.DATA_FORMAT, ":2"),
    "stray.csv": (HEAD + b'p1,"a"b,asthma,A\n', Code.DATA_FORMAT, ":2"),
    "notes.xlsx": (b"PK", Code.DATA_FORMAT, ""),
    "notes.csv.zip": (b"PK", Code.DATA_FORMAT, ""),
    "notes.parquet.gz": (b"PK", Code.DATA_FORMAT, ""),
    "plain": (HEAD + GOOD, Code.DATA_FORMAT, ""),
    "not_gzip.csv.gz": (HEAD + GOOD, Code.DATA_UNREADABLE, ""),
    "cut.csv.gz": (gzip.compress(HEAD + GOOD * 100)[:60], Code.DATA_UNREADABLE, ""),
    "bad.parquet": (b"PAR1 and then nothing", Code.DATA_FORMAT, "Parquet"),
    "bad.ndjson": (f'{{"text": "{CANARY}\n'.encode(), Code.DATA_FORMAT, ":1"),
    "list.ndjson": (b"[1, 2]\n", Code.DATA_FORMAT, "object"),
    "deep.ndjson": (b"[" * 100_000 + b"\n", Code.DATA_FORMAT, ":1"),
    "missing.ndjson": (b'{"patient": "p", "txt": "x"}\n', Code.DATA_COLUMNS, "did you mean txt"),
    "nan.ndjson": (
        b'{"patient": NaN, "text": "x", "label": "asthma", "hospital": "A"}\n',
        Code.DATA_FORMAT,
        "finite",
    ),
    "huge_number.ndjson": (
        b'{"patient": 1e999, "text": "x", "label": "asthma", "hospital": 1}\n',
        Code.DATA_VALUE,
        "not a finite number",
    ),
    "object.ndjson": (
        b'{"patient": {}, "text": "x", "label": "asthma", "hospital": "A"}\n',
        Code.DATA_VALUE,
        "column patient",
    ),
    "bool.ndjson": (
        b'{"patient": true, "text": "x", "label": "asthma", "hospital": "A"}\n',
        Code.DATA_VALUE,
        "column patient",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_place_fix_and_no_content(name, tmp_path):
    content, code, said = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(path, COLUMNS, labels=LABELS)
    assert caught.value.code is code
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert CANARY not in caught.value.report()
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "d.csv").mkdir()
    for name in ("absent.csv", "d.csv"):
        with pytest.raises(DataError) as caught:
            read_table(tmp_path / name, COLUMNS, labels=LABELS)
        assert caught.value.code is Code.DATA_UNREADABLE
    with pytest.raises(DataError):
        file_sha256(tmp_path / "absent.csv")


def test_a_non_finite_number_in_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    table = {"patient": [1.0, float("nan")], "text": ["x", "y"], "label": ["asthma"] * 2}
    parquet.write_table(pa.table(table), path)
    with pytest.raises(DataError) as caught:
        read_table(path, TableColumns("text", "patient", "label"), labels=LABELS)
    assert caught.value.code is Code.DATA_VALUE
    assert f"{path}:2" in str(caught.value)
    table["patient"] = [1.0, 2.0]
    parquet.write_table(pa.table(table), path)
    records = read_table(path, TableColumns("text", "patient", "label"), labels=LABELS)
    assert [r.patient for r in records] == ["1", "2"]


@pytest.mark.parametrize("name", ["long.csv.gz", "long.ndjson.gz"])
def test_a_line_of_200_megabytes_is_refused_in_little_memory(name, tmp_path):
    path = tmp_path / name
    start = HEAD + b'p1,"' if "csv" in name else b'{"text": "'
    path.write_bytes(gzip.compress(start) + gzip.compress(b"a" * 2**20) * 200)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read_table(path, COLUMNS, labels=LABELS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.code is Code.DATA_TOO_LONG
    assert peak < 40 * 2**20


def test_a_quoted_field_over_many_lines_is_bounded_too(tmp_path):
    path = tmp_path / "long.csv"
    path.write_bytes(HEAD + b'p1,"' + (b"a" * 1023 + b"\n") * 5000)
    with pytest.raises(DataError) as caught:
        read_table(path, COLUMNS, labels=LABELS)
    assert caught.value.code is Code.DATA_TOO_LONG


def _record(patient, line):
    return Record(patient, "x", "asthma", None, "f.csv", line)


def test_a_patient_in_train_and_test_is_refused_naming_both_places():
    require_disjoint([_record("p1", 2)], [_record("p2", 9)])
    with pytest.raises(DataError) as caught:
        require_disjoint(
            [_record("p1", 2), _record("p3", 3)], [_record("p2", 9), _record("p3", 10)]
        )
    assert caught.value.code is Code.DATA_OVERLAP
    assert "f.csv:10" in str(caught.value)
    assert "f.csv:3" in str(caught.value)
    assert "p3" not in str(caught.value)


# ---------------------------------------------------------------- notes of one patient


def notes_of(*patients, text="a note of p{}, number {}"):
    """Rows in the order of `patients`, each note numbered within its patient."""
    seen = dict.fromkeys(patients, 0)
    rows = []
    for who in patients:
        seen[who] += 1
        rows.append((who, text.format(who, seen[who]), "asthma", "A"))
    return rows


def capped(most):
    return replace(COLUMNS, most=most)


def peak(path, most) -> int:
    tracemalloc.start()
    take_tables([path], capped(most), labels=LABELS)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_a_patient_with_a_hundred_thousand_notes_takes_bounded_memory(tmp_path):
    text = "{}" + "x" * 200 + "{}"
    path = _write_csv(tmp_path / "many.csv", notes_of(*["p2"] * 100_000, "p1", text=text))
    assert peak(path, 64) < 2**20
    taken = take_tables([path], capped(64), labels=LABELS)
    assert [len(group) for group in by_patient(taken.records).values()] == [64, 1]
    assert taken.dropped == {"p2": 99_936}
    # Control: the measure sees what is kept.
    few = _write_csv(tmp_path / "few.csv", notes_of(*["p2"] * 10_000, text=text))
    assert peak(few, None) > 2**21


def test_the_first_notes_of_a_patient_in_file_order_are_read(tmp_path):
    one = _write_csv(tmp_path / "one.csv", notes_of("p1", "p2", "p1", "p1"))
    two = _write_csv(tmp_path / "two.csv", notes_of("p2", "p2", "p3"))
    taken = take_tables([one, two], capped(2), labels=LABELS)
    assert [(r.patient, r.file[-7:], r.line) for r in taken.records] == [
        ("p1", "one.csv", 2), ("p2", "one.csv", 3), ("p1", "one.csv", 4), ("p2", "two.csv", 2),
        ("p3", "two.csv", 4),
    ]  # fmt: skip
    assert taken.dropped == {"p1": 1, "p2": 1}
    assert read_tables([one, two], capped(2), labels=LABELS) == taken.records


@pytest.mark.parametrize("gone", ["p1", "p2", "p3", "p4"])
def test_which_notes_of_a_patient_are_read_depends_on_nobody_else(gone, tmp_path):
    order = ["p1", "p2", "p1", "p3", "p1", "p4", "p2", "p3", "p3", "p1", "p3", "p2", "p3"]
    rows = notes_of(*order)
    whole = _write_csv(tmp_path / "whole.csv", rows)
    without = _write_csv(tmp_path / "without.csv", [row for row in rows if row[0] != gone])
    kept = [
        [(r.patient, r.text) for r in take_tables([p], capped(2), labels=LABELS).records]
        for p in (whole, without)
    ]
    assert [note for note in kept[0] if note[0] != gone] == kept[1]
    assert kept[0] != kept[1]


def test_a_fault_in_a_note_that_is_not_read_is_still_named(tmp_path):
    rows = [*notes_of(*["p1"] * 5), ("p1", CANARY, "no such label", "A")]
    with pytest.raises(DataError) as caught:
        take_tables([_write_csv(tmp_path / "a.csv", rows)], capped(2), labels=LABELS)
    assert caught.value.code is Code.DATA_LABEL
    assert ":7:" in caught.value.message
    assert CANARY not in caught.value.message


def test_the_second_hospital_of_a_patient_stays_in_sight(tmp_path):
    rows = [*notes_of(*["p1"] * 5), ("p1", "elsewhere", "asthma", "B")]
    taken = take_tables([_write_csv(tmp_path / "a.csv", rows)], capped(2), labels=LABELS)
    assert {r.site for r in taken.records} == {"A", "B"}


def test_without_a_cap_every_note_is_read(tmp_path):
    path = _write_csv(tmp_path / "a.csv", notes_of(*["p1"] * 5000))
    assert len(read_table(path, COLUMNS, labels=LABELS)) == 5000
