"""Reading numeric columns: what counts as missing, and what is a mistake, by file and line."""

from __future__ import annotations

import json
import math

import pytest

from client.data.tables import TableColumns, read_table
from common.errors import Code, DataError

COLUMNS = TableColumns(None, "patient", "label", None, ("age", "crp"))


def write(folder, text, name="labs.csv"):
    path = folder / name
    path.write_text(text)
    return path


def read(path, columns=COLUMNS, labels=("no", "yes")):
    return read_table(path, columns, labels=labels)


def test_numbers_come_in_the_order_of_the_study(tmp_path):
    path = write(tmp_path, "crp,label,age,patient\n1.5,yes,-40,p1\n 2e1 ,no,.5,p2\n")
    first, second = read(path)
    assert (first.patient, first.label, first.text) == ("p1", "yes", "")
    assert first.values == (-40.0, 1.5)
    assert second.values == (0.5, 20.0)


@pytest.mark.parametrize("cell", ["", "?", " ", " ? "])
def test_an_empty_cell_or_a_question_mark_is_missing(tmp_path, cell):
    (record,) = read(write(tmp_path, f"age,crp,label,patient\n{cell},2,no,p1\n"))
    assert math.isnan(record.values[0])
    assert record.values[1] == 2


@pytest.mark.parametrize(
    "cell",
    ["nan", "inf", "-Infinity", "1e999", "12 mg", "1_000", "0x1f", "1,5", "\uff11", "--1", "NA"],
)
def test_anything_else_that_is_no_finite_number_is_refused_by_line(tmp_path, cell):
    path = write(tmp_path, f'age,crp,label,patient\n1,2,no,p1\n"{cell}",2,no,p2\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code is Code.DATA_VALUE
    assert f"{path}:3: column age is not a " in caught.value.message
    assert cell not in caught.value.message.removeprefix(str(path)).replace("finite", "")


def test_a_row_without_a_patient_column_is_its_own_patient(tmp_path):
    path = write(tmp_path, "age,crp,label\n1,2,no\n1,2,yes\n")
    records = read(path, TableColumns(None, None, "label", None, ("age", "crp")))
    assert len({r.patient for r in records}) == 2


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r":1: there is no column crp among 3 \(did you mean CRP\?\)"
    ):
        read(
            write(tmp_path, "age,CRP,label\n1,2,no\n"),
            TableColumns(None, None, "label", None, ("age", "crp")),
        )


def test_ndjson_has_numbers_or_text_or_null(tmp_path):
    rows = [
        {"age": 61, "crp": None, "label": "no", "patient": 7},
        {"age": "62.5", "crp": "?", "label": "yes", "patient": "8"},
    ]
    path = write(tmp_path, "\n".join(json.dumps(row) for row in rows), "labs.ndjson")
    first, second = read(path)
    assert (first.values[0], second.values[0]) == (61.0, 62.5)
    assert math.isnan(first.values[1])
    assert math.isnan(second.values[1])
    for bad in ("true", "[1]", str(10**400)):
        worse = write(
            tmp_path, f'{{"age": {bad}, "crp": 1, "label": "no", "patient": "p"}}', "bad.ndjson"
        )
        with pytest.raises(DataError, match=r":1: column age is not a"):
            read(worse)


def test_parquet_has_numbers_and_nulls_and_refuses_nan(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    def table(ages):
        columns = {
            "age": pa.array(ages, pa.float64()),
            "crp": [1, 2],
            "label": ["no", "yes"],
            "patient": ["a", "b"],
        }
        path = tmp_path / "labs.parquet"
        parquet.write_table(pa.table(columns), path)
        return path

    first, second = read(table([61.0, None]))
    assert first.values == (61.0, 1.0)
    assert math.isnan(second.values[0])
    with pytest.raises(DataError, match=r":2: column age is not a finite number"):
        read(table([61.0, math.nan]))


def test_notes_have_no_values(tmp_path):
    (record,) = read_table(write(tmp_path, "text\nfever\n"), TableColumns("text"), labels=None)
    assert record.values == ()
