"""The three steps as two people type them, with what they read and what a program reads."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.config import SiteConfig
from common.config import load
from common.errors import Code
from server.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "opacus", "dp_accounting", "rich", "pyarrow", "matplotlib"}
HEAVY |= {"structlog", "scipy", "peft", "flwr", "prometheus_client", "grpc", "numpy"}


@pytest.fixture
def desks(tmp_path, monkeypatch):
    """Runs the tests in a folder with the coordinator's desk and the hospital's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "co").mkdir()
    (tmp_path / "st").mkdir()
    return tmp_path


@pytest.fixture
def told(wardround):
    """Runs a command line with --json and returns what it says; a fault is a fault of the test."""

    def run(*words: object) -> dict[str, object]:
        status, out, err = wardround(*words, "--json")
        assert (status, err) == (0, "")
        return json.loads(out.splitlines()[-1])

    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CO = ("--config", "co/coordinator.yaml")
ST = ("--config", "st/site.yaml")


def enrolled(told) -> dict[str, object]:
    """Everything up to the telephone call."""
    told("server", "init", *CO, "--name", "Lakeland", "--dns", "wr.example.org", "--port", 9443)
    told("server", "invite", "St. Mary", *CO, "--out", "st/st-mary.invite")
    return told("client", "join", "st/st-mary.invite", *ST)


def test_three_steps_enrol_a_hospital(desks, told) -> None:
    first = told("server", "init", *CO, "--name", "Lakeland", "--dns", "wr.example.org")
    assert first["url"] == "wr.example.org:8443"
    assert set(first["made"]) == {"identity.key", "tls/ca.crt", "tls/server.crt", "admin.token"}
    assert told("server", "init", *CO)["made"] == []
    invite = told("server", "invite", "St. Mary", *CO, "--out", "st/st-mary.invite")
    assert (invite["site"], invite["rotates"], invite["words"]) == (
        "st-mary",
        False,
        first["words"],
    )
    joined = told("client", "join", "st/st-mary.invite", *ST)
    assert joined["coordinator_words"] == first["words"]
    assert joined["join"] == "st/st-mary.join"
    assert len(joined["words"].split()) == 8
    admitted = told("server", "admit", "st/st-mary.join", *CO, "--words", joined["words"])
    assert (admitted["site"], admitted["roster"], admitted["rotated"]) == ("st-mary", 1, False)
    roster = told("server", "roster", *CO)
    assert [(s["site"], s["name"], s["status"]) for s in roster["sites"]] == [
        ("st-mary", "St. Mary", "admitted")
    ]
    assert roster["invited"] == []
    # New keys, in the same three steps.
    assert told("server", "invite", "St. Mary", *CO, "--out", "st/new.invite")["rotates"]
    rotated = told("client", "rotate", "st/new.invite", *ST)
    assert rotated["words"] != joined["words"]
    told("server", "admit", "st/st-mary.join", *CO, "--words", rotated["words"])
    (site,) = told("server", "roster", *CO)["sites"]
    assert site["keys_version"] == 2
    assert told("server", "revoke", "st-mary", *CO)["roster"] == 3
    assert told("server", "roster", *CO)["sites"][0]["status"] == "revoked"
    assert told("server", "renew", *CO)["names"] == ["wr.example.org"]


def test_the_files_written_for_people_are_right_as_they_are(desks, told) -> None:
    enrolled(told)
    config = load("co/coordinator.yaml", CoordinatorConfig)
    assert (config.consortium, config.url) == ("Lakeland", "wr.example.org:9443")
    site = load("st/site.yaml", SiteConfig)
    assert site.site == "st-mary"
    assert site.ceilings.approved_studies == ()
    assert site.ceilings.require_privacy
    shipped = load(ROOT / "configs/coordinator.yaml", CoordinatorConfig)
    assert shipped.names == ("localhost", "127.0.0.1")


@pytest.mark.parametrize("site", ["null", "true", "12", "1e5", "0x1f", "a"])
def test_a_site_id_that_yaml_would_read_otherwise_is_written_as_text(desks, told, site) -> None:
    told("server", "init", *CO)
    told("server", "invite", "A", "--site", site, *CO, "--out", "st/x.invite")
    told("client", "join", "st/x.invite", *ST)
    assert load("st/site.yaml", SiteConfig).site == site


def test_a_consortium_may_be_called_anything_printable(desks, told, wardround) -> None:
    name = 'He said: "a" # {b} 医院'
    told("server", "init", *CO, "--name", name)
    assert load("co/coordinator.yaml", CoordinatorConfig).consortium == name
    status, _, err = wardround("server", "init", "--config", "co/b.yaml", "--name", "a\nb: c")
    assert status == 2
    assert "consortium: must be printable text" in err
    assert not Path("co/b.yaml").exists()


def test_what_each_command_says_names_the_next_one(desks, wardround) -> None:
    def said(*words: object) -> str:
        status, out, _ = wardround(*words)
        assert status == 0
        return out

    assert 'next: wardround server invite "NAME' in said("server", "init", *CO)
    out = said("server", "invite", "St. Mary", *CO, "--out", "st/st-mary.invite")
    assert "wardround client join st-mary.invite" in out
    assert "wardround server admit st-mary.join" in out
    assert "invited, until 20" in said("server", "roster", *CO)
    out = said("client", "join", "st/st-mary.invite", *ST)
    assert "read aloud:\n  " in out
    assert "wardround check st/site.yaml" in out
    words = out.split("read aloud:\n  ")[1].splitlines()[0]
    out = said("server", "admit", "st/st-mary.join", *CO, "--words", words)
    assert "St. Mary (st-mary) is admitted; the roster has version 1" in out
    assert "wardround server publish" in out
    out = said("server", "roster", *CO)
    assert out.splitlines()[-1] == "roster version 1"
    said("server", "invite", "St. Mary", *CO, "--out", "st/st-mary.invite")
    assert "read aloud" in said("client", "rotate", "st/st-mary.invite", *ST)
    assert "is revoked; the roster has version 2" in said("server", "revoke", "st-mary", *CO)
    assert "wr" not in said("server", "renew", *CO).split(":")[0]


def test_at_a_terminal_only_the_word_yes_admits(desks, told, wardround, monkeypatch) -> None:
    words = enrolled(told)["words"]
    for answer in ("", "no\n", "y\n", "\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        status, _, err = wardround("server", "admit", "st/st-mary.join", *CO)
        assert status == 2
        assert words in err
        assert "WR-3215" in err
    assert told("server", "roster", *CO)["sites"] == []
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    status, out, err = wardround("server", "admit", "st/st-mary.join", *CO)
    assert status == 0
    assert "on a number that you knew before" in err
    assert "is admitted" in out


def test_without_a_terminal_nobody_is_admitted_unheard(desks, told, wardround, monkeypatch) -> None:
    enrolled(told)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    status, _, err = wardround("server", "admit", "st/st-mary.join", *CO)
    assert (status, Code.WORDS_UNCONFIRMED.label in err) == (2, True)
    status, _, err = wardround("server", "admit", "st/st-mary.join", *CO, "--words", "yes")
    assert (status, "WR-3214" in err) == (5, True)
    assert told("server", "roster", *CO)["sites"] == []


def test_options_never_change_a_configuration_that_is_there(desks, told, wardround) -> None:
    told("server", "init", *CO, "--name", "Lakeland", "--port", 9443)
    before = Path("co/coordinator.yaml").read_bytes()
    told("server", "init", *CO, "--name", "Lakeland", "--port", 9443)
    status, _, err = wardround("server", "init", *CO, "--name", "Other", "--port", 1)
    assert status == 2
    assert "says otherwise than --name, --port" in err
    assert Path("co/coordinator.yaml").read_bytes() == before


def test_a_hospital_keeps_its_own_site_yaml(desks, told, wardround) -> None:
    enrolled(told)
    path = Path("st/site.yaml")
    path.write_text(path.read_text().replace("data/records.csv", "mine.csv"))
    before = path.read_bytes()
    assert told("client", "join", "st/st-mary.invite", *ST)["config_written"] is False
    assert path.read_bytes() == before
    path.write_text(path.read_text().replace("site: st-mary", "site: lakeside"))
    status, _, err = wardround("client", "join", "st/st-mary.invite", *ST)
    assert (status, "WR-3206" in err) == (2, True)


def test_a_bad_invite_leaves_nothing_behind(desks, told, wardround) -> None:
    enrolled(told)
    text = Path("st/st-mary.invite").read_text().replace("wr.example.org", "evil.example")
    Path("forged.invite").write_text(text)
    status, _, err = wardround("client", "join", "forged.invite", "--config", "new/site.yaml")
    assert (status, "WR-3202" in err) == (5, True)
    assert not Path("new").exists()
    status, _, err = wardround("client", "rotate", "st/st-mary.invite", "--config", "new/site.yaml")
    assert (status, "WR-3207" in err) == (2, True)


def test_before_init_every_verb_says_what_to_type(desks, wardround) -> None:
    for words in (["roster"], ["invite", "A"], ["revoke", "a"], ["renew"], ["publish", "b"]):
        status, _, err = wardround("server", *words, *CO)
        assert status == 2
        assert "wardround server init" in err


def test_no_verb_of_enrolment_imports_anything_heavy(desks, told) -> None:
    # The reason they answer at once.
    words = str(enrolled(told)["words"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = (
        "import sys; from common.cli import main; status = main(sys.argv[1:]); "
        "print('|'.join({name.partition('.')[0] for name in sys.modules})); sys.exit(status)"
    )
    for line in (
        ["server", "init", *CO],
        ["server", "invite", "East", *CO, "--out", "east.invite"],
        ["client", "join", "st/st-mary.invite", *ST],
        ["server", "admit", "st/st-mary.join", *CO, "--words", words],
        ["server", "roster", *CO],
        ["server", "renew", *CO],
        ["server", "revoke", "st-mary", *CO],
    ):
        run = subprocess.run(  # noqa: PLW1510
            [sys.executable, "-c", program, *line], capture_output=True, text=True, env=environment
        )
        assert run.returncode == 0, run.stderr
        modules = set(run.stdout.splitlines()[-1].split("|"))
        assert modules & HEAVY == set(), line
        assert "cryptography" in modules  # control: the list is of this process
