"""OMOP folders: what a reader makes of them, and what it makes of what is wrong with them."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import subprocess
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from client.data.intake import System, receive_cases
from client.data.readers.database import Database
from client.data.readers.files import Item, Wanted
from client.data.readers.omop import OmopReader
from common.errors import Code, DataError, StorageError
from common.study import Study

CANARY = "canary-7f3a"
EVERYTHING = Wanted(notes=True, codes=True, drugs=True, measurements=True)

FILES = {
    "PERSON.csv": (
        "person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth\n"
        "1,8532,1950,3,1\n2,8507,1925,,\n"
    ),
    "visit_occurrence.csv": (
        "visit_occurrence_id,person_id,visit_start_date,visit_start_datetime,visit_end_date,"
        "visit_end_datetime,care_site_id\n"
        "10,1,2020-01-01,2020-01-01 10:00:00,2020-01-05,2020-01-05 09:00:00,7\n"
        "11,2,2020-02-01,,2020-02-03,,0\n"
    ),
    "death.csv": "person_id,death_date\n2,2020-02-03\n",
    "concept.csv": (
        "concept_id,concept_name,vocabulary_id,concept_code\n"
        "320128,Essential hypertension,SNOMED,59621000\n"
        "35207668,Essential (primary) hypertension,ICD10CM,I10\n"
        "1310149,warfarin,RxNorm,11289\n"
        "3016723,Creatinine [Mass/volume] in Serum,LOINC,2160-0\n"
        "8840,milligram per deciliter,UCUM,mg/dL\n"
        "706391,Discharge summary,Note Type,x\n"
        "99,Own code,Own,Z\n"
    ),
    "condition_occurrence.csv": (
        "person_id,visit_occurrence_id,condition_concept_id,condition_start_date,"
        "condition_source_concept_id,condition_source_value,condition_status_concept_id\n"
        "1,10,320128,2020-01-01,35207668,I10,32902\n"
    ),
    "drug_exposure.csv.gz": (
        "person_id,visit_occurrence_id,drug_concept_id,drug_exposure_start_date,"
        "drug_exposure_start_datetime,drug_exposure_end_date,drug_source_value\n"
        "1,10,1310149,2020-01-02,2020-01-02 08:00:00,2020-01-04,WARF\n"
    ),
    "measurement.csv": (
        "person_id,visit_occurrence_id,measurement_concept_id,measurement_date,"
        "measurement_datetime,value_as_number,unit_concept_id,unit_source_value,"
        "measurement_source_value\n"
        "1,10,3016723,2020-01-01,2020-01-01 12:00:00,1.2,8840,mg/dl,CREA\n"
    ),
    "note.csv": (
        "person_id,visit_occurrence_id,note_date,note_datetime,note_class_concept_id,note_title,"
        "note_text\n"
        "1,10,2020-01-05,2020-01-05 00:00:00,706391,,Short of breath.\n"
    ),
}


def read(folder, wanted=EVERYTHING):
    reader = OmopReader(folder, wanted=wanted)
    return list(reader.encounters()), reader.tally.counts


def at(*parts):
    return datetime(*parts, tzinfo=UTC).replace(tzinfo=None)


def edited(name, old, new):
    assert old in FILES[name]
    return {**FILES, name: FILES[name].replace(old, new)}


def added(name, row):
    return {**FILES, name: FILES[name] + row + "\n"}


def as_parquet(folder, name):
    """The same table with types of its own: numbers, dates and times."""
    (source,) = [path for path in folder.iterdir() if path.name.lower().startswith(name + ".")]
    rows = list(csv.DictReader(io.StringIO(FILES[source.name])))
    columns = {}
    for key in rows[0]:
        cells = [row[key] or None for row in rows]
        if key.endswith("_datetime"):
            cells = [cell and datetime.fromisoformat(cell) for cell in cells]
        elif key.endswith("_date"):
            cells = [cell and date.fromisoformat(cell) for cell in cells]
        elif key.endswith(("_id", "_birth")) and key != "vocabulary_id":
            cells = [None if cell is None else int(cell) for cell in cells]
        elif key == "value_as_number":
            cells = [float(cell) for cell in cells]
        columns[key] = cells
    parquet.write_table(pa.table(columns), folder / f"{name}.parquet")
    source.unlink()


# ---- what is read


def test_a_folder_is_read_whole(write_folder):
    (first, second), counts = read(write_folder(FILES))
    assert (first.patient, first.encounter, first.site) == ("1", "10", "7")
    assert (first.start, first.end) == (at(2020, 1, 1, 10), at(2020, 1, 5, 9))
    assert first.age == pytest.approx(69.84, abs=0.01)
    assert (first.sex, first.died) == ("female", False)
    assert (second.sex, second.died, second.site, second.age) == ("male", True, None, 90)
    assert second.end == at(2020, 2, 3, 23, 59, 59)
    assert [(c.system, c.code, c.rank) for c in first.codes] == [
        ("icd10", "I10", 1),
        ("snomed", "59621000", 1),
    ]
    assert [(d.system, d.code, d.name, d.start) for d in first.drugs] == [
        ("rxnorm", "11289", "warfarin", at(2020, 1, 2, 8))
    ]
    assert [(m.item, m.value, m.unit, m.time) for m in first.measurements] == [
        ("2160-0", 1.2, "mg/dL", at(2020, 1, 1, 12))
    ]
    assert [(n.kind, n.text) for n in first.notes] == [("Discharge summary", "Short of breath.")]
    assert counts == {"births without a month (the middle of the year is taken)": 1}


def test_a_day_without_a_time_is_its_end(write_folder):
    """Else what was written in the evening would be known in the morning."""
    (first, _), _ = read(write_folder(FILES))
    assert first.notes[0].time == at(2020, 1, 5, 23, 59, 59)
    assert first.codes[0].time == at(2020, 1, 1, 23, 59, 59)


def test_parquet_says_the_same_as_csv(write_folder):
    folder = write_folder(FILES)
    before = read(folder)[0]
    for name in ("person", "visit_occurrence", "death", "concept", "condition_occurrence",
                 "drug_exposure", "measurement", "note"):  # fmt: skip
        as_parquet(folder, name)
    after, _ = read(folder)

    def plain(encounter):
        return [getattr(encounter, name) for name in encounter.__slots__ if name != "file"]

    assert [plain(one) for one in after] == [plain(one) for one in before]
    assert after[0].file.endswith("visit_occurrence.parquet")


@pytest.mark.parametrize("name", ["2160-0", "crea", "creatinine [mass/volume] in serum"])
def test_wanted_measurements_are_found_by_code_name_or_source(name, write_folder):
    (first, _), _ = read(write_folder(FILES), Wanted(measurements=True, items=(Item(name),)))
    assert [m.item for m in first.measurements] == [name]


def test_what_is_not_wanted_needs_no_table(write_folder):
    few = {k: v for k, v in FILES.items() if k in {"PERSON.csv", "visit_occurrence.csv"}}
    (first, _), counts = read(write_folder(few), Wanted())
    assert first.died is None
    assert counts["tables of deaths that are not there (who died is unknown)"] == 1


# ---- planted faults: a clear error

FAULTS = {
    "no persons": ({**FILES, "PERSON.csv": None}, Code.DATA_UNREADABLE, "holds no table person"),
    "no concepts": ({**FILES, "concept.csv": None}, Code.DATA_UNREADABLE, "holds no table concept"),
    "no notes": ({**FILES, "note.csv": None}, Code.DATA_UNREADABLE, "holds no table note"),
    "no visits": (
        {**FILES, "visit_occurrence.csv": FILES["visit_occurrence.csv"].partition("\n")[0] + "\n"},
        Code.DATA_EMPTY, "holds no record",
    ),
    "a table twice": (
        {**FILES, "note.csv.gz": FILES["note.csv"]}, Code.DATA_FORMAT, "is there twice",
    ),
    "a column is missing": (
        edited("PERSON.csv", "year_of_birth", "birthyear"), Code.DATA_COLUMNS, "no column year_of_birth",
    ),
    "a visit without an id": (
        edited("visit_occurrence.csv", "11,2,", ",2,"), Code.DATA_VALUE, ":3: column visit_occurrence_id is empty",
    ),
    "a visit of two persons": (
        edited("visit_occurrence.csv", "11,2,", "10,2,"), Code.DATA_VALUE, "to another patient",
    ),
    "a person twice": (added("PERSON.csv", "1,8507,1960,1,1"), Code.DATA_VALUE, ":4: column person_id"),
    "a 13th month": (edited("PERSON.csv", "1950,3,1", "1950,13,1"), Code.DATA_VALUE, "part of no date"),
    "a birth in words": (
        edited("PERSON.csv", "1950,3,1", f"{CANARY},3,1"), Code.DATA_VALUE, "column year_of_birth",
    ),
    "a start in words": (
        edited("visit_occurrence.csv", "2020-01-01 10:00:00", CANARY), Code.DATA_VALUE,
        ":2: column visit_start_datetime is no date",
    ),
    "a time with a zone": (
        edited("measurement.csv", "2020-01-01 12:00:00", "2020-01-01 12:00:00+01:00"),
        Code.DATA_VALUE, "without a zone",
    ),
    "a death in words": (edited("death.csv", "2020-02-03", CANARY), Code.DATA_VALUE, "death_date"),
    "a ragged row": (added("note.csv", "1,10"), Code.DATA_RAGGED, "note.csv:3: has 2 fields"),
    "another encoding": (
        {**FILES, "note.csv": (FILES["note.csv"] + "1,10,,,,,Süd\n").encode("latin-1")},
        Code.DATA_ENCODING, "note.csv:3: is not UTF-8",
    ),
    "no Parquet": (
        {**FILES, "note.csv": None, "note.parquet": b"PAR1 not"}, Code.DATA_UNREADABLE, "not a whole Parquet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_read_is_named(name, write_folder):
    files, code, told = FAULTS[name]
    with pytest.raises(DataError) as caught:
        read(write_folder(files))
    assert caught.value.code is code
    assert told in caught.value.message
    assert CANARY not in caught.value.message


# ---- planted faults: a counted drop

DROPS = {
    "visits of an unknown person": added("visit_occurrence.csv", "12,3,2020-01-01,,,,"),
    "encounters that come again (the first is kept)": added(
        "visit_occurrence.csv", "10,1,2020-01-01,,2020-01-05,,7"
    ),
    "encounters that end before they begin": added(
        "visit_occurrence.csv", "12,1,2020-01-05,,2020-01-01,,7"
    ),
    "persons without a year of birth": added("PERSON.csv", "3,8507,,,"),
    "impossible ages (taken as unknown)": {
        **FILES,
        "PERSON.csv": FILES["PERSON.csv"] + "3,8507,2030,1,1\n",
        "visit_occurrence.csv": FILES["visit_occurrence.csv"] + "12,3,2020-01-01,,2020-01-05,,7\n",
    },
    "deaths without a date": added("death.csv", "1,"),
    "concepts that the table concept does not have": edited(
        "concept.csv", "3016723,Creatinine", "3016724,Creatinine"
    ),
    "conditions outside any encounter": added("condition_occurrence.csv", "1,,320128,,0,,"),
    "conditions of an unknown encounter": added("condition_occurrence.csv", "1,77,320128,,0,,"),
    "conditions of another patient than the encounter's": added(
        "condition_occurrence.csv", "2,10,320128,,0,,"
    ),
    "conditions without a code": added("condition_occurrence.csv", "1,10,0,2020-01-01,0,,"),
    "conditions coded in no known system (kept by name)": added(
        "condition_occurrence.csv", "1,10,99,2020-01-01,0,,"
    ),
    "drugs coded in no known system (kept by name)": added(
        "drug_exposure.csv.gz", "1,10,0,2020-01-02,,,HERBS"
    ),
    "drugs that stop before they start (kept without the stop)": added(
        "drug_exposure.csv.gz", "1,10,1310149,2020-01-03,,2020-01-01,"
    ),
    "measurements without a number": added("measurement.csv", "1,10,3016723,2020-01-01,,>9,8840,,"),
    "measurements in another unit than the item's first (kept)": added(
        "measurement.csv", "1,10,3016723,2020-01-01,,90,0,umol/L,"
    ),
    "notes without text": added("note.csv", "1,10,2020-01-05,,706391,, "),
    "tables that hold no record": {
        **FILES,
        "note.csv": FILES["note.csv"].partition("\n")[0] + "\n",
    },
}


@pytest.mark.parametrize("reason", DROPS)
def test_what_is_left_out_is_counted(reason, write_folder):
    _, counts = read(write_folder(DROPS[reason]))
    assert counts[reason] == 1


def test_nothing_is_counted_where_nothing_is_wrong(write_folder):
    """The control of the table above."""
    _, counts = read(write_folder(FILES))
    assert not set(DROPS) & set(counts)


# ---- a database

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
needs_server = pytest.mark.skipif(
    not _BINARIES or (os.geteuid() == 0 and shutil.which("runuser") is None),
    reason="PostgreSQL is not installed (Debian: postgresql)",
)


@pytest.fixture(scope="module")
def server():
    """The socket folder of a server of its own, which listens nowhere else."""
    tools = _BINARIES[-1].parent
    user = "postgres" if os.geteuid() == 0 else None
    home = Path(tempfile.mkdtemp(prefix="wr-pg-", dir="/tmp"))
    if user is not None:
        shutil.chown(home, user)

    def run(*words):
        subprocess.run(words, check=True, capture_output=True, user=user, cwd="/")

    data = str(home / "data")
    run(str(tools / "initdb"), "-D", data, "-U", "reader", "--auth=trust", "-E", "UTF8")
    options = f"-c listen_addresses= -c unix_socket_directories={home} -c fsync=off"
    control = str(tools / "pg_ctl")
    try:
        run(control, "-D", data, "-w", "-o", options, "-l", str(home / "log"), "start")
        yield home
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run(control, "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def filled(server):
    """The tables of test_omop.py, with types of their own, in a schema `cdm`."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(f"host={server} user=reader dbname=postgres") as connection:
        connection.execute("create schema cdm")
        for file, text in FILES.items():
            rows = list(csv.DictReader(io.StringIO(text)))
            table = file.partition(".")[0].lower()
            kinds = {name: _kind(name) for name in rows[0]}
            columns = sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind))
                for name, kind in kinds.items()
            )
            where = sql.Identifier("cdm", table)
            connection.execute(sql.SQL("create table {} ({})").format(where, columns))
            places = sql.SQL(", ").join([sql.Placeholder()] * len(kinds))
            insert = sql.SQL("insert into {} values ({})").format(where, places)
            for row in rows:
                connection.execute(insert, [row[name] or None for name in kinds])
    return server


def _kind(name):
    if name.endswith("_datetime"):
        return "timestamp"
    if name.endswith("_date"):
        return "date"
    if name == "value_as_number":
        return "numeric"
    return "integer" if name.endswith(("_id", "_birth")) and name != "vocabulary_id" else "text"


@pytest.fixture
def address(filled, tmp_path):
    path = tmp_path / "omop.url"
    path.write_text(f"postgresql://reader:{CANARY}@/postgres?host={filled}\n")
    path.chmod(0o600)
    return path


@needs_server
def test_a_database_says_the_same_as_files(address, write_folder):
    database = Database(address, "cdm")
    from_database = OmopReader(database, wanted=EVERYTHING)
    found = list(from_database.encounters())
    database.close()
    from_files = OmopReader(write_folder(FILES), wanted=EVERYTHING)
    expected = list(from_files.encounters())

    def plain(encounter):
        return [
            getattr(encounter, name) for name in encounter.__slots__ if name not in {"file", "line"}
        ]

    assert [plain(one) for one in found] == [plain(one) for one in expected]
    assert from_database.tally == from_files.tally
    assert CANARY not in found[0].where


@needs_server
def test_nothing_can_be_written(address):
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    database = Database(address, "cdm")
    with pytest.raises(SQLAlchemyError, match="read-only"):
        database._connection.execute(text("delete from cdm.person"))
    database.close()


@needs_server
def test_all_tables_tell_of_one_moment(address, filled):
    """Who comes in between the reading of two tables is in neither."""
    import psycopg

    database = Database(address, "cdm")
    before = len(list(database.require("person").rows(["person_id"])))
    with psycopg.connect(f"host={filled} user=reader dbname=postgres") as other:
        other.execute("insert into cdm.person values (9, 8507, 1960, 1, 1)")
    try:
        assert len(list(database.require("person").rows(["person_id"]))) == before
        database.close()
        again = Database(address, "cdm")
        assert len(list(again.require("person").rows(["person_id"]))) == before + 1, "control"
        again.close()
    finally:
        with psycopg.connect(f"host={filled} user=reader dbname=postgres") as other:
            other.execute("delete from cdm.person where person_id = 9")


STUDY = {
    "format": "wardround-study/1",
    "name": "omop",
    "task": {
        "kind": "tabular",
        "labels": ["survived", "died"],
        "features": [{"name": "age", "low": 18.0, "high": 90.0}],
    },
    "cases": {
        "label": {"kind": "mortality"},
        "values": [{"name": "age", "of": "age", "low": 18.0, "high": 90.0}],
    },
    "privacy": {"mode": "none"},
    "sites": [{"id": name} for name in ("east", "north", "south")],
}


@needs_server
def test_a_hospitals_database_gives_cases(address):
    system = System("omop", address, database=True, schema="cdm")
    found = receive_cases(Study.model_validate(STUDY), system)
    assert {record.patient: record.label for record in found.records} == {
        "1": "survived",
        "2": "died",
    }
    assert System.load(system.dump()) == system


def refused(make):
    with pytest.raises((DataError, StorageError)) as caught:
        make()
    assert CANARY not in caught.value.message + caught.value.remedy
    return caught.value


@needs_server
def test_a_table_or_column_that_is_missing_is_named(address, filled):
    import psycopg

    database = Database(address, "cdm")
    assert refused(lambda: database.require("observation")).code is Code.DATA_UNREADABLE
    error = refused(lambda: list(database.require("person").rows(["race"])))
    assert (error.code, "race" in error.message) == (Code.DATA_COLUMNS, True)
    database.close()
    empty = Database(address)
    assert "no table person" in refused(lambda: empty.require("person")).message
    empty.close()
    assert psycopg.__version__


@needs_server
def test_a_server_that_goes_away_is_told(address):
    database = Database(address, "cdm")
    rows = database.require("person").rows(["person_id"])
    next(rows)
    rows.close()
    database.close()
    error = refused(lambda: list(database.require("visit_occurrence").rows(["person_id"])))
    assert error.code is Code.DATA_UNREADABLE


@pytest.mark.parametrize(
    ("content", "mode", "code"),
    [
        (f"postgresql://reader:{CANARY}@127.0.0.1:1/none", 0o600, Code.DATA_UNREADABLE),
        (f"mysql://reader:{CANARY}@host/name", 0o600, Code.DATA_FORMAT),
        (f"{CANARY} is no address", 0o600, Code.DATA_FORMAT),
        (f"postgresql://reader:{CANARY}@host/name", 0o644, Code.KEY_FILE_OPEN),
        ("", 0o600, Code.KEY_FILE_DAMAGED),
        (None, 0o600, Code.KEY_FILE_DAMAGED),
    ],
)
def test_an_address_that_leads_nowhere_is_told_and_not_repeated(content, mode, code, tmp_path):
    path = tmp_path / "omop.url"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    assert refused(lambda: Database(path)).code is code
