"""What people really feed in: each fault has a status, a code, a place and a fix; nothing is lost."""

from __future__ import annotations

import json
import shutil

import pytest

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
