"""Long tables become one series for each stay, and mistakes are named by file and record."""

from __future__ import annotations

import csv
import gzip
import os
import tracemalloc
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from client.data.series import (
    AFTER,
    BEFORE,
    NO_HOURS,
    NO_TARGET,
    UNKNOWN,
    SeriesColumns,
    series_columns,
    take_series,
)
from common.errors import Code, DataError
from common.tasks.prognosis import PrognosisTask

CANARY = "canary-7f3a"
LABELS = ("home", "died")
COLUMNS = SeriesColumns(
    stay="stay",
    time="hour",
    features=("hr", "crea", "age"),
    hours=4,
    patient="patient",
    label="label",
)
HOURLY = [
    ("stay", "hour", "hr", "crea"),
    ("s1", "0", "80", ""),
    ("s1", "1.5", "?", "1.1"),
    ("s2", "0", "90", "2"),
    ("s1", "3", "81", ""),
]
STAYS = [
    ("stay", "patient", "label", "age", "ward"),
    ("s1", "p1", "home", "70", "A"),
    ("s2", "p2", "died", "", "B"),
]


def write(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return path


@pytest.fixture
def two(tmp_path):
    """Writes both files, each as given, and reads them."""

    def read(hourly=HOURLY, stays=STAYS, columns=COLUMNS, labels=LABELS):
        paths = [write(tmp_path / "hours.csv", hourly), write(tmp_path / "stays.csv", stays)]
        return take_series(paths, columns, labels=labels)

    return read


def changed(rows, row, column, cell):
    rows = [list(r) for r in rows]
    rows[row][column] = cell
    return rows


def test_hours_are_put_on_the_grid_and_joined_with_what_is_said_of_the_stay(two):
    first, second = two().records
    assert (first.patient, first.encounter, first.label) == ("p1", "s1", "home")
    assert np.array_equal(
        first.series,
        np.array(
            [[80, np.nan, 70], [np.nan, 1.1, np.nan], [np.nan] * 3, [81, np.nan, np.nan]],
            np.float32,
        ),
        equal_nan=True,
    )
    assert second.series.shape == (1, 3)
    assert second.series[0, :2].tolist() == [90, 2]
    assert np.isnan(second.series[0, 2])
    assert first.where.endswith("stays.csv:2")
    assert "p1" not in repr(first)


def parquets(folder, *, unit="s"):
    """The same stays as Parquet: ids are numbers, times durations, gaps nulls or NaN."""
    hourly = pa.table(
        {
            "stay": pa.array([1, 1, 2, 1], pa.int32()),
            "hour": pa.array([0, 90, 0, 180], pa.duration("s")).cast(pa.duration(unit))
            if unit == "s"
            else pa.array([timedelta(minutes=m) for m in (0, 90, 0, 180)], pa.duration(unit)),
            "hr": pa.array([80, None, 90, 81], pa.int64()),
            "crea": [float("nan"), 1.1, 2.0, None],
        }
    )
    if unit == "s":
        hourly = hourly.set_column(1, "hour", pa.array([0, 5400, 0, 10800], pa.duration("s")))
    stays = {"stay": [1.0, 2.0], "patient": ["p1", "p2"], "age": [70, None], "label": LABELS}
    parquet.write_table(hourly, folder / "hours.parquet")
    parquet.write_table(pa.table(stays), folder / "stays.parquet")
    return [folder / "hours.parquet", folder / "stays.parquet"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_parquet_and_csv_give_the_same_records(two, tmp_path, unit):
    wanted = two().records
    found = take_series(parquets(tmp_path, unit=unit), COLUMNS, labels=LABELS).records
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(ours.series, theirs.series, equal_nan=True)
        assert (ours.patient, ours.label) == (theirs.patient, theirs.label)
    assert [record.encounter for record in found] == ["1", "2"]


def test_the_order_of_rows_and_of_files_and_gzip_change_nothing(two, tmp_path):
    wanted = two().records
    hours = write(tmp_path / "a.csv.gz", [HOURLY[0], *reversed(HOURLY[1:])])
    halves = [write(tmp_path / f"{n}.csv", [STAYS[0], STAYS[n]]) for n in (1, 2)]
    found = take_series([halves[0], hours, halves[1]], COLUMNS, labels=LABELS).records
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(ours.series, theirs.series, equal_nan=True)


@pytest.mark.parametrize(("unit", "factor"), [("days", 24), ("hours", 1), ("minutes", 1 / 60)])
def test_times_are_read_in_the_unit_that_the_study_says(two, unit, factor):
    rows = [HOURLY[0], *((s, str(float(t) / factor), *rest) for s, t, *rest in HOURLY[1:])]
    records = two(rows, columns=replace(COLUMNS, unit=unit)).records
    assert [len(record.series) for record in records] == [4, 1]


def test_rows_outside_the_hours_of_the_study_are_never_seen_and_are_counted(two):
    rows = [*HOURLY, ("s1", "-1", "1", "1"), ("s2", "4", "999", "9"), ("x", "0", "1", "1")]
    found = two(rows)
    assert found.tally.counts == {BEFORE: 1, AFTER: 1, UNKNOWN: 1}
    assert all(np.nanmax(record.series) < 100 for record in found.records)
    # Control: a study with more hours sees them.
    assert np.nanmax(two(rows, columns=replace(COLUMNS, hours=5)).records[1].series) == 999


def test_the_last_of_several_values_of_one_hour_counts(two):
    found = two([*HOURLY, ("s1", "0.2", "60", ""), ("s1", "0.9", "", "")])
    assert found.records[0].series[0, 0] == 60


def test_stays_that_cannot_be_used_are_left_out_and_counted(two):
    stays = [*STAYS, ("s3", "p3", "home", "50", "C")]
    assert two(stays=stays).tally.counts == {NO_HOURS: 1}


def test_a_stay_without_an_outcome_is_counted_where_the_hours_name_it(tmp_path):
    hours = write(tmp_path / "h.csv", HOURLY)
    table = write(tmp_path / "s.csv", [row[:1] + row[3:4] for row in STAYS])
    told = write(tmp_path / "o.csv", [row[:3] for row in STAYS[:2]])
    found = take_series([hours, table, told], COLUMNS, labels=LABELS)
    assert found.tally.counts == {NO_TARGET: 1}


def test_of_a_patient_with_many_stays_the_first_are_taken(two):
    stays = [STAYS[0], ("s1", "p", "home", "1", "A"), ("s2", "p", "died", "2", "A")]
    found = two(stays=stays, columns=replace(COLUMNS, most=1))
    assert [record.encounter for record in found.records] == ["s1"]
    assert found.dropped == {"p": 1}


def test_one_file_by_the_hour_is_enough_where_it_says_everything(tmp_path):
    rows = [("stay", "hour", "hr", "where"), ("a", "0", "80", "N"), ("a", "1", "81", "N")]
    columns = SeriesColumns(
        stay="stay", time="hour", features=("hr",), hours=4, site="where", patient=None
    )
    (record,) = take_series([write(tmp_path / "h.csv", rows)], columns, labels=None).records
    assert (record.patient, record.site, record.label) == ("a", "N", None)


def test_a_number_is_read_as_what_is_to_be_predicted(two):
    columns = replace(COLUMNS, label=None, number="age", features=("hr", "crea"))
    stays = changed(STAYS, 2, 3, "1e1")
    assert [r.number for r in two(stays=stays, columns=columns).records] == [70.0, 10.0]


FAULTS = {
    "a word for a number": (changed(HOURLY, 2, 3, CANARY), STAYS, Code.DATA_VALUE, "hours.csv:3"),
    "no end": (changed(HOURLY, 2, 3, "1e999"), STAYS, Code.DATA_VALUE, "hours.csv:3"),
    "beyond float32": (changed(HOURLY, 2, 3, "1e60"), STAYS, Code.DATA_VALUE, "hours.csv:3"),
    "not a number": (changed(HOURLY, 1, 2, "nan"), STAYS, Code.DATA_VALUE, "hours.csv:2"),
    "no time": (changed(HOURLY, 4, 1, ""), STAYS, Code.DATA_VALUE, "hours.csv:5"),
    "a date": (changed(HOURLY, 4, 1, "2020-01-01"), STAYS, Code.DATA_VALUE, "hours.csv:5"),
    "no stay": (changed(HOURLY, 4, 0, " "), STAYS, Code.DATA_VALUE, "hours.csv:5"),
    "a field more": (
        [*HOURLY, ("s1", "0", "1", "1", CANARY)],
        STAYS,
        Code.DATA_RAGGED,
        "hours.csv:6",
    ),
    "no such label": (HOURLY, changed(STAYS, 1, 2, "hom"), Code.DATA_LABEL, "did you mean home"),
    "an empty label": (HOURLY, changed(STAYS, 1, 2, ""), Code.DATA_VALUE, "stays.csv:2"),
    "a stay twice": (HOURLY, [*STAYS, STAYS[1]], Code.DATA_VALUE, "stays.csv:4"),
    "no patient": (HOURLY, changed(STAYS, 2, 1, ""), Code.DATA_VALUE, "stays.csv:3"),
    "no such column": (changed(HOURLY, 0, 2, "HR "), STAYS, Code.DATA_COLUMNS, "did you mean HR"),
    "no time column": (changed(HOURLY, 0, 1, "when"), STAYS, Code.DATA_COLUMNS, "column hour"),
    "no stay column": (HOURLY, changed(STAYS, 0, 0, "id"), Code.DATA_COLUMNS, "stays.csv"),
    "a column twice": (changed(HOURLY, 0, 3, "hr"), STAYS, Code.DATA_COLUMNS, "twice"),
    "in both files": (changed(HOURLY, 0, 2, "age"), STAYS, Code.DATA_COLUMNS, ""),
    "nobody": (HOURLY[:1], STAYS, Code.DATA_EMPTY, ""),
    "an open quote": ([*HOURLY, ('s"1', "0", "1", "1")], STAYS, None, ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_file_and_record_and_never_repeated(two, fault):
    hourly, stays, code, told = FAULTS[fault]
    if code is None:
        assert two(hourly, stays).tally.counts == {UNKNOWN: 1}
        return
    with pytest.raises(DataError) as raised:
        two(hourly, stays)
    assert raised.value.code is code
    assert told in str(raised.value)
    assert CANARY not in str(raised.value)


def test_two_files_that_say_different_things_of_a_stay_are_refused(tmp_path):
    paths = [write(tmp_path / "h.csv", HOURLY)]
    paths += [write(tmp_path / "a.csv", STAYS)]
    paths += [write(tmp_path / "b.csv", [("stay", "label"), ("s2", "died"), ("s1", "died")])]
    with pytest.raises(DataError, match=r"b\.csv:3: column label says two things"):
        take_series(paths, COLUMNS, labels=LABELS)


def broken(tmp_path, kind):
    """(path, code) of a file that is damaged in one way."""
    path = tmp_path / "h.csv"
    whole = write(path, HOURLY).read_bytes()
    if kind == "truncated gzip":
        path = tmp_path / "h.csv.gz"
        path.write_bytes(gzip.compress(whole * 1000)[:-40])
        return path, {Code.DATA_UNREADABLE, Code.DATA_FORMAT}
    if kind == "no gzip":
        path = tmp_path / "h.csv.gz"
        path.write_bytes(whole)
        return path, {Code.DATA_UNREADABLE}
    if kind == "latin1":
        path.write_bytes(whole + "s1,1,1,\xb5\n".encode("latin1"))
        return path, {Code.DATA_ENCODING}
    if kind == "truncated parquet":
        full = parquets(tmp_path)[0]
        full.write_bytes(full.read_bytes()[:-20])
        return full, {Code.DATA_FORMAT}
    if kind == "empty":
        path.write_bytes(b"")
        return path, {Code.DATA_EMPTY}
    if kind == "long line":
        path.write_bytes(whole + b"s1,1," + b"1" * (9 << 20) + b",1\n")
        return path, {Code.DATA_TOO_LONG, Code.DATA_VALUE}
    if kind == "another kind":
        return path.rename(tmp_path / "h.xlsx"), {Code.DATA_FORMAT}
    return tmp_path / "none.csv", {Code.DATA_UNREADABLE}


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated gzip", "no gzip", "latin1", "truncated parquet", "empty", "long line"),
        *("another kind", "missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, kind):
    path, codes = broken(tmp_path, kind)
    with pytest.raises(DataError) as raised:
        take_series([path, write(tmp_path / "s.csv", STAYS)], COLUMNS, labels=LABELS)
    assert raised.value.code in codes
    assert path.name in str(raised.value)


def test_a_parquet_time_that_is_a_date_is_refused(tmp_path):
    hours, stays = parquets(tmp_path)
    table = parquet.read_table(hours)
    dates = pa.array([datetime(2020, 1, 1)] * 4, pa.timestamp("us"))  # noqa: DTZ001
    parquet.write_table(table.set_column(1, "hour", dates), hours)
    with pytest.raises(DataError, match="since the start"):
        take_series([hours, stays], COLUMNS, labels=LABELS)


def test_memory_follows_from_the_stays_and_not_from_the_files(tmp_path):
    many = 600_000
    table = pa.table(
        {
            "stay": np.arange(many) % 10,
            "hour": (np.arange(many) % 96) / 24,
            "hr": np.arange(many, dtype=np.float64),
        }
    )
    parquet.write_table(table, tmp_path / "h.parquet", row_group_size=1 << 14)
    del table
    columns = SeriesColumns(stay="stay", time="hour", features=("hr",), hours=4)
    take_series([tmp_path / "h.parquet"], replace(columns, hours=1), labels=None)
    tracemalloc.start()
    found = take_series([tmp_path / "h.parquet"], columns, labels=None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.records) == 10
    assert peak < 100 * many  # all cells as Python objects would be more


def test_a_study_names_its_columns():
    feature = {"name": "hr", "low": 0.0, "high": 300.0}
    told = {"column": "los", "low": 0.0, "high": 9.0}
    task = PrognosisTask.model_validate(
        {"kind": "prognosis", "number": told, "features": [feature], "hours": 5}
    )
    found = series_columns(task, site="ward")
    assert (found.number, found.label, found.site, found.features) == ("los", None, "ward", ("hr",))
    assert series_columns(task, target=False).facts() == ("patient",)


def test_yaibs_tables_are_read_as_they_are():
    root = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[4] / "shared" / "data"))
    folder = root / "yaib_demo" / "demo_data" / "mortality24" / "mimic_demo"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    columns = SeriesColumns(
        stay="stay_id", time="time", features=("hr", "crea", "age"), hours=25, label="label"
    )
    paths = [folder / f"{name}.parquet" for name in ("dyn", "sta", "outc")]
    found = take_series(paths, columns, labels=("0", "1")).records
    assert len(found) == parquet.read_metadata(paths[2]).num_rows
    assert {record.label for record in found} == {"0", "1"}
    assert all(record.series.shape == (25, 3) for record in found)
    assert all(record.series[0, 2] > 10 for record in found)


GROUPED = replace(COLUMNS, groups=("ward", "sex"))


def test_subgroups_are_what_the_tables_say_of_a_stay(tmp_path):
    stays = [(*STAYS[0], "sex"), (*STAYS[1], "f"), (*STAYS[2][:4], "", " ")]
    files = [write(tmp_path / "h.csv", HOURLY), write(tmp_path / "s.csv", stays)]
    one, other = take_series(files, GROUPED, labels=LABELS).records
    assert one.groups == ("ward:A", "sex:f")
    assert other.groups == ("ward:unknown", "sex:unknown")
    assert take_series(files, COLUMNS, labels=LABELS).records[0].groups == ()


def test_a_whole_number_of_parquet_is_the_subgroup_that_text_would_be(tmp_path):
    stays = pa.table(
        {
            "stay": ["s1", "s2"],
            "patient": ["p1", "p2"],
            "label": ["home", "died"],
            "age": [70.0, 64.0],
            "ward": pa.array([3.0, None]),
            "sex": pa.array(["f", "m"]).dictionary_encode(),
        }
    )
    parquet.write_table(stays, tmp_path / "s.parquet")
    files = [write(tmp_path / "h.csv", HOURLY), tmp_path / "s.parquet"]
    found = take_series(files, GROUPED, labels=LABELS).records
    assert [record.groups for record in found] == [
        ("ward:3", "sex:f"),
        ("ward:unknown", "sex:m"),
    ]


def test_two_subgroups_of_one_stay_are_refused(tmp_path):
    hours = [(*HOURLY[0], "sex"), *((*row, "fmfm"[at]) for at, row in enumerate(HOURLY[1:]))]
    files = [write(tmp_path / "h.csv", hours), write(tmp_path / "s.csv", STAYS)]
    with pytest.raises(DataError, match=r"h.csv:3: column sex says two things") as refused:
        take_series(files, GROUPED, labels=LABELS)
    assert refused.value.code is Code.DATA_VALUE


def test_a_subgroup_that_no_file_has_is_refused(tmp_path):
    files = [write(tmp_path / "h.csv", HOURLY), write(tmp_path / "s.csv", STAYS)]
    with pytest.raises(DataError, match="no column sex") as refused:
        take_series(files, GROUPED, labels=LABELS)
    assert refused.value.code is Code.DATA_COLUMNS
