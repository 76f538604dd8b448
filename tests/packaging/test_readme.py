"""The README's commands do what it says.

The demo and the verbs on the user's own files run here as they are written, in an empty folder
with the project's `configs`. Installation commands are checked against pyproject.toml and not run:
continuous integration runs exactly the second of them.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from common.cli import commands, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands_of(text: str) -> list[list[str]]:
    """Every command in a `sh` block, without comments; `a && b` is two."""
    lines: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            lines += line.split("&&")
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


def test_every_command_of_the_readme_is_known():
    verbs = {name.split()[0] for name in commands()}
    found = commands_of(README)
    assert len(found) >= 10
    for words in found:
        assert words[0] in {"pip", "pytest", "wardround"}, words
        if words[0] == "wardround":
            assert words[1] in verbs, words


def test_control_an_unknown_command_is_noticed():
    text = "```sh\npip install x && wardround simulat y  # a comment\n```\n"
    assert commands_of(text) == [["pip", "install", "x"], ["wardround", "simulat", "y"]]


def test_what_the_readme_installs_is_an_extra_or_a_locked_file():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    installs = [words for words in commands_of(README) if words[:2] == ["pip", "install"]]
    assert installs
    for words in installs:
        for word in words[2:]:
            for extra in re.findall(r"\[(\w+)\]", word):
                assert extra in extras, words
            if word.endswith(".txt"):
                assert (ROOT / word).is_file(), words


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as a user has it: the examples, and notes of one's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    notes = (ROOT / "configs" / "data" / "synthetic-notes.csv").read_text().splitlines(True)
    (tmp_path / "notes.csv").write_text("".join(notes[:9]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readmes_verbs_run_as_they_are_written(desk, capfd):
    ran = []
    for words in commands_of(README):
        if words[0] != "wardround" or words[1] == "demo":
            continue
        assert main(words[1:]) == 0, (words, capfd.readouterr().err)
        ran.append(words[1])
    assert ran[:3] == ["check", "plan", "simulate"]
    assert {"privacy", "audit", "predict", "resume"} <= set(ran)
    assert (desk / "my-run" / "model" / "model.safetensors").is_file()
    assert "Traceback" not in capfd.readouterr().err


def test_the_demo_does_what_the_readme_promises(desk, capfd):
    assert main(["demo", "--json"]) == 0
    import json

    told = json.loads(capfd.readouterr().out)
    folder = Path(told["output"])
    assert folder == Path("wardround-demo")
    assert told["rounds_completed"] == 12
    assert told["audit_verified"] is True
    # Twelve rounds and an evaluation at five hospitals; one drops out, one crashes.
    assert told["coordinator_saw"] == {"masked_updates": 13 * 5 - 2, "plain_updates": 0}
    assert all(e["spent"] <= e["cap"] == 8 for e in told["epsilon"].values())
    final = told["final_metrics"]
    alone = [site["alone_everywhere"]["accuracy"] for site in final["per_site"].values()]
    together = final["everywhere"]["accuracy"]
    # Much better together on everybody's patients, and hard enough that nobody is perfect.
    assert together > sum(alone) / len(alone) + 0.05
    assert together < 0.95
    # The folder is accepted by the verbs that the demo names next.
    for words in (["privacy"], ["audit", "verify"], ["resume"]):
        assert main([*words, str(folder)]) == 0
    assert main(["predict", str(folder / "model"), str(folder / "synthetic-notes.csv")]) == 0
