"""What people really feed in: each fault has a status, a code, a place and a fix; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN = {"privacy": {"mode": "none", "epsilon": None, "delta": None, "clip_norm": None}}
HEADER = "patient,hospital,text,label\n"
MEGABYTE = 1 << 20


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def _missing(folder):
    (folder / "notes.csv").unlink()


def _a_folder(folder):
    (folder / "notes.csv").unlink()
    (folder / "notes.csv").mkdir()


def _empty(folder):
    (folder / "notes.csv").write_text("")


def _no_record(folder):
    (folder / "notes.csv").write_text(HEADER)


def _wrong_column(folder):
    _replace(folder / "notes.csv", "patient,hospital,text,label", "patient,hospital,note,label")


def _unknown_label(folder):
    with (folder / "notes.csv").open("a") as stream:
        stream.write("east-x,east,a cough,influenza\n")


def _too_few(folder):
    with (folder / "notes.csv").open("a") as stream:
        stream.writelines(f"tiny-{i},tiny,a cough,asthma\n" for i in range(3))


def _not_utf8(folder):
    with (folder / "notes.csv").open("ab") as stream:
        stream.write("east-x,east,H\u00f6he,asthma\n".encode("latin-1"))


def _long_line(folder):
    with (folder / "notes.csv").open("a") as stream:
        stream.write("east-x,east,")
        for _ in range(200):
            stream.write("a" * MEGABYTE)
        stream.write(",asthma\n")


def _ragged(folder):
    with (folder / "notes.csv").open("a") as stream:
        stream.write("east-x,east,a cough, really,asthma\n")


def _two_hospitals(folder):
    with (folder / "notes.csv").open("a") as stream:
        stream.write("east-p1,west,a cough,asthma\n")


def _damaged_parquet(folder):
    (folder / "notes.csv").unlink()
    (folder / "notes.parquet").write_bytes(b"PAR1 but not really PAR1")
    _replace(folder / "study.yaml", "notes.csv", "notes.parquet")


def _overlap(folder):
    lines = (folder / "notes.csv").read_text().splitlines(keepends=True)
    (folder / "test.csv").write_text("".join([*lines[:2], *lines[-20:]]))
    study = json.loads((folder / "study.yaml").read_text())
    study["simulation"]["data"]["test_files"] = ["test.csv"]
    (folder / "study.yaml").write_text(json.dumps(study))


def _no_model(folder):
    (folder / "no-model").mkdir()
    study = json.loads((folder / "study.yaml").read_text())
    study["model"]["backbone"] = str(folder / "no-model")
    (folder / "study.yaml").write_text(json.dumps(study, indent=1))


def _pickled_model(folder):
    study = json.loads((folder / "study.yaml").read_text())
    shutil.copytree(study["model"]["backbone"], folder / "pickled")
    weights = folder / "pickled" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    study["model"]["backbone"] = str(folder / "pickled")
    (folder / "study.yaml").write_text(json.dumps(study, indent=1))


def _backbone(folder, value):
    study = json.loads((folder / "study.yaml").read_text())
    study["model"]["backbone"] = str(value)
    (folder / "study.yaml").write_text(json.dumps(study, indent=1))


def _copied_model(folder):
    study = json.loads((folder / "study.yaml").read_text())
    shutil.copytree(study["model"]["backbone"], folder / "copied")
    _backbone(folder, folder / "copied")
    return folder / "copied"


def _a_file_for_a_model(folder):
    (folder / "model.bin").write_bytes(b"weights")
    _backbone(folder, folder / "model.bin")


def _no_such_model(folder):
    _backbone(folder, folder / "nowhere")


def _no_such_package(folder):
    _backbone(folder, "package:nobody_has_this/model")


def _outside_the_package(folder):
    _backbone(folder, "package:common/../client")


def _model_without_tokenizer(folder):
    for path in _copied_model(folder).glob("tokenizer*"):
        path.unlink()


def _model_with_broken_config(folder):
    (_copied_model(folder) / "config.json").write_text("{")


def _model_cut_short(folder):
    path = _copied_model(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _no_simulation(folder):
    study = json.loads((folder / "study.yaml").read_text())
    del study["simulation"]
    study["sites"] = [{"id": name} for name in ("east", "north", "south", "west")]
    (folder / "study.yaml").write_text(json.dumps(study, indent=1))


def _typo(folder):
    _replace(folder / "study.yaml", '"rounds"', '"ronds"')


# how the input is spoiled; exit status; code; what the message must name; words of the fix
CASES = {
    "a missing file": (_missing, 3, "WR-2001", "notes.csv", "Check the path"),
    "a folder for a file": (_a_folder, 3, "WR-2001", "notes.csv", "Check the path"),
    "an empty file": (_empty, 3, "WR-2003", "notes.csv", "Export it again"),
    "a header alone": (_no_record, 3, "WR-2003", "notes.csv", "Export it again"),
    "a wrong column": (_wrong_column, 3, "WR-2005", "notes.csv", "task.columns"),
    "an unknown label": (_unknown_label, 3, "WR-2009", "notes.csv:134", "task.labels"),
    "a site below the floor": (_too_few, 3, "WR-2012", "tiny has 3 patients", ""),
    "another encoding": (_not_utf8, 3, "WR-2004", "notes.csv:134", "iconv"),
    "a line of 200 MB": (_long_line, 3, "WR-2007", "notes.csv:134", "missing quote"),
    "a comma too many": (_ragged, 3, "WR-2006", "notes.csv:134", "unquoted comma"),
    "a patient at two sites": (_two_hospitals, 3, "WR-2011", "notes.csv:134", ""),
    "a damaged parquet file": (_damaged_parquet, 3, "WR-2002", "notes.parquet", ""),
    "a patient in train and test": (_overlap, 3, "WR-2010", "test.csv:2", "one side"),
    "a folder that is no model": (_no_model, 3, "WR-2101", "no-model", ""),
    "a pickled model": (_pickled_model, 3, "WR-21", "pickled", ""),
    "a file for a model folder": (_a_file_for_a_model, 3, "WR-2101", "model.bin", "config.json"),
    "a model folder that is not there": (_no_such_model, 3, "WR-2101", "nowhere", "config.json"),
    "a model package that is not there": (_no_such_package, 3, "WR-2101", "nobody_has", "Install"),
    "a folder beside the package": (_outside_the_package, 3, "WR-2101", "common/../client", ""),
    "a model without a tokenizer": (_model_without_tokenizer, 3, "WR-2101", "copied", "tokenizer"),
    "a model with a broken config": (_model_with_broken_config, 3, "WR-2101", "copied", ""),
    "a model cut short": (_model_cut_short, 3, "WR-21", "copied", ""),
    "a study that is no simulation": (_no_simulation, 2, "WR-1090", "tiny", "split"),
    "a misspelt key": (_typo, 2, "WR-1004", "study.yaml:", "Correct every line"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_bad_input_is_told_with_its_place_and_fix(make_study, wardround, tmp_path, name):
    spoil, status, code, place, fix = CASES[name]
    study = make_study(PLAIN)
    assert wardround("plan", study)[0] == 0, "the control: unspoiled, it is right"
    spoil(tmp_path)
    out = tmp_path / "out"
    found, told, problems = wardround("simulate", study, "--out", out)
    assert found == status, problems
    assert code in problems
    assert place in problems
    assert "what to do" in problems
    assert fix in problems
    assert "Traceback" not in told + problems
    assert len(problems) < 1500, "a message is short, and holds no record"
    assert not out.exists(), "nothing was begun"
    found, told, problems = wardround("simulate", study, "--out", out, "--json")
    fault = json.loads(told)["error"]
    assert fault["exit_status"] == found == status
    assert fault["code"].startswith(code)
    assert fault["remedy"]
    assert problems == ""


# ---------------------------------------------------------------------------- numbers
def _labs(folder, suffix=".csv"):
    """The tabular example of configs/ in a folder of its own; its records, as rows of cells."""
    study = (CONFIGS / "tabular.yaml").read_text()
    (folder / "study.yaml").write_text(study.replace("data/synthetic-labs.csv", f"labs{suffix}"))
    lines = (CONFIGS / "data" / "synthetic-labs.csv").read_text().splitlines()
    names, *rows = [line.split(",") for line in lines]
    return names, rows


def _write_csv(folder, names, rows):
    (folder / "labs.csv").write_text("\n".join(",".join(row) for row in [names, *rows]) + "\n")


NUMBERS = [
    "inf",
    "-inf",
    "nan",
    "NaN",
    "Infinity",
    "1e999",
    "-1e400",
    "0x10",
    "1_000",
    "five",
    "1 2",
]


@pytest.mark.parametrize("cell", NUMBERS)
def test_a_number_that_is_none_is_told_with_its_line_and_column(wardround, tmp_path, cell):
    names, rows = _labs(tmp_path)
    rows[9][names.index("crp")] = cell
    _write_csv(tmp_path, names, rows)
    out = tmp_path / "out"
    for verb in (
        ("simulate", tmp_path / "study.yaml", "--out", out),
        ("plan", tmp_path / "study.yaml"),
    ):
        status, told, problems = wardround(*verb)
        assert status == 3
        assert "WR-2008" in problems
        assert "labs.csv:11: column crp" in problems
        assert "Correct or remove the record" in problems
        assert "Traceback" not in told + problems
        assert cell not in problems.partition("column crp")[2], "no cell is repeated"
    assert not out.exists()


@pytest.mark.parametrize("cell", ["", " ", "?", "1e3", "+.5", "-0", " 7 "])
def test_control_a_missing_value_and_an_unusual_number_are_read(wardround, tmp_path, cell):
    names, rows = _labs(tmp_path)
    rows[9][names.index("crp")] = cell
    _write_csv(tmp_path, names, rows)
    assert wardround("plan", tmp_path / "study.yaml")[0] == 0


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("Infinity", "WR-2002", "labs.ndjson:10:"),
        ("NaN", "WR-2002", "labs.ndjson:10:"),
        ("1e999", "WR-2008", "labs.ndjson:10: column crp"),
        ("1" + "0" * 400, "WR-2008", "labs.ndjson:10: column crp"),
        ("true", "WR-2008", "labs.ndjson:10: column crp"),
        ("[7]", "WR-2008", "labs.ndjson:10: column crp"),
        ("1" + "0" * 5000, "WR-2002", "labs.ndjson:10:"),
        ("null", "", ""),
        ("7", "", ""),
    ],
    ids=lambda value: str(value)[:12],
)
def test_the_same_holds_for_numbers_in_json(wardround, tmp_path, text, code, place):
    names, rows = _labs(tmp_path, ".ndjson")
    lines = []
    for at, row in enumerate(rows):
        cells = [
            f'"{name}": {cell or "null"}'
            if name in {"age", "systolic", "crp", "heart_rate"}
            else f'"{name}": {json.dumps(cell)}'
            for name, cell in zip(names, row, strict=True)
            if not (at == 9 and name == "crp")
        ]
        lines.append("{" + ", ".join([*cells, f'"crp": {text}'] if at == 9 else cells) + "}")
    (tmp_path / "labs.ndjson").write_text("\n".join(lines).replace(": ?", ": null") + "\n")
    status, told, problems = wardround("plan", tmp_path / "study.yaml")
    assert (status == 3) is bool(code), problems
    assert code in problems
    assert place in problems
    assert "Traceback" not in told + problems


@pytest.mark.parametrize("value", [float("inf"), float("nan"), None, 7.0])
def test_the_same_holds_for_numbers_in_parquet(wardround, tmp_path, value):
    import pyarrow as pa
    from pyarrow import parquet

    names, rows = _labs(tmp_path, ".parquet")
    columns = {}
    for at, name in enumerate(names):
        cells = [row[at] for row in rows]
        if name not in {"patient", "hospital", "label"}:
            cells = [float(cell) if cell not in {"", "?"} else None for cell in cells]
        columns[name] = cells
    columns["crp"][9] = value
    parquet.write_table(pa.table(columns), tmp_path / "labs.parquet")
    status, _, problems = wardround("plan", tmp_path / "study.yaml")
    bad = value is not None and value != 7.0
    assert status == (3 if bad else 0)
    assert ("labs.parquet:10: column crp is not a finite number" in problems) is bad


# ------------------------------------------------------------------------ the machine's faults
@pytest.mark.parametrize("at", [1, 2, 12, 40])
def test_a_disk_that_fills_up_is_told_with_what_to_do(
    make_study, wardround, tmp_path, monkeypatch, at
):
    """At every one of these writes the run stops, names a file and loses nothing it had."""
    study = make_study({**PLAIN, "training": {"rounds": 1}})
    real, counted = os.write, [0]

    def write(handle, data):
        counted[0] += handle > 2
        if handle > 2 and counted[0] >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", write)
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "out")
    assert counted[0] >= at, "the disk was full before the end"
    assert status == 7
    assert "No space left on device" in problems
    assert "what to do: Free disk space" in problems
    assert "Traceback" not in told + problems
    assert (tmp_path / "notes.csv").exists()


def test_a_label_that_one_site_lacks_is_noted_and_the_run_goes_on(make_study, wardround, tmp_path):
    study = make_study({**PLAIN, "training": {"rounds": 1}})
    lines = (tmp_path / "notes.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not (line.startswith("east") and "asthma" in line)]
    (tmp_path / "notes.csv").write_text("".join(kept))
    status, _, problems = wardround("simulate", study, "--out", tmp_path / "out")
    assert status == 0
    assert "note: site east has no record of 1 label(s): asthma." in problems


@pytest.mark.parametrize("flag", [(), ("--json",)])
def test_a_folder_without_permission_is_told(make_study, wardround, tmp_path, flag, monkeypatch):
    import pathlib

    study = make_study(PLAIN)

    def refuse(*_args, **_more):
        raise PermissionError(13, "Permission denied")

    # Root may write anywhere, so the operating system's answer is played.
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "out", *flag)
    assert status == 7
    assert "Permission denied" in told + problems
    assert "Traceback" not in told + problems


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (("predict", "nowhere", "notes.csv"), 3, "WR-2"),
        (("privacy", "nowhere"), 7, "WR-3006"),
        (("audit", "verify", "nowhere"), 7, "WR-6043"),
        (("resume", "nowhere"), 7, "WR-6008"),
        (("plan", "nowhere.yaml"), 2, "WR-1002"),
        (("simulate", "nowhere.yaml"), 2, "WR-1002"),
        (("check", "nowhere.yaml"), 2, "WR-1002"),
        (("study", "build", "nowhere.yaml"), 2, "WR-1002"),
        (("simulate",), 2, "WR-7001"),
        (("simulat", "x.yaml"), 2, "WR-7001"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_verb_tells_what_is_not_there(wardround, tmp_path, monkeypatch, words, status, code):
    monkeypatch.chdir(tmp_path)
    found, told, problems = wardround(*words)
    assert (found, told) == (status, "")
    assert code in problems
    assert "what to do" in problems
    assert "Traceback" not in problems
    assert list(tmp_path.iterdir()) == []
