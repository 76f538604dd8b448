"""The verbs of whoever operates a hospital, and the daemon behind `client run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from client.budget import settle_unapproved
from client.folders import FRESH_SECONDS, HospitalFolder, heartbeat_age
from client.hospital import open_population
from client.link import LinkState
from client.operate import Operation
from client.operate_cli import follow
from client.privacy.ledger import Charge, Ledger, RoundId
from common.accountant import DpEvent
from common.errors import Code, RefusedError, StorageError
from common.logs import open_log
from common.world import SystemEntropy, unix_seconds

ROOT = Path(__file__).parents[3]


@pytest.fixture
def verb(consortium, wardround):
    def run(*words, site="north"):
        return wardround("client", *words, "--config", consortium.yaml(site))

    return run


@pytest.fixture
def plain(verb):
    def run(*words):
        status, out, err = verb(*words, "--json")
        return status, json.loads(out.splitlines()[-1]) if out else err

    return run


# ---------------------------------------------------------------------------- review, approve


def test_an_approval_that_is_taken_back_stays_on_record_and_nothing_runs(consortium, plain):
    folder = consortium.publish()
    assert plain("approve", folder, "--by", "Dr. Grey")[0] == 0
    host, digest = consortium.host("north"), consortium.bundle.digest
    assert host.ask(digest, (), hello=True).payloads  # control: approved, it says hello
    signed = host.folder.study(digest).approval.read_bytes()
    status, told = plain("withdraw", consortium.bundle.study.name)
    assert (status, told["withdrawn"]) == (0, True)
    with pytest.raises(RefusedError) as refused:
        host.ask(digest, (), hello=True)
    assert refused.value.code is Code.APPROVAL_STUDY
    [kept] = host.folder.study(digest).root.glob("withdrawn-*.json")
    assert kept.read_bytes() == signed
    assert "study.withdrawn" in host.folder.log.read_text()
    # By its digest, too; and a person may approve it again.
    assert plain("approve", folder, "--by", "Dr. Grey")[1]["new"]
    assert plain("withdraw", digest.hex()[:8])[0] == 0


def _planned(consortium, steps=5, drawn=2):
    """The hospital's ledger with an open plan of the study, and two of its steps drawn."""
    ledger = open_population(
        consortium.config("north"), HospitalFolder(consortium.state("north")), SystemEntropy()
    )
    plan = ledger.reserve_plan(
        consortium.bundle.digest, "", [Charge("train", "train", (DpEvent(9.0, 1.0, steps),))], "s"
    )
    step = [Charge("train", "train", (DpEvent(9.0, 1.0, 1),))]
    for number in range(1, drawn + 1):
        ledger.draw_round(plan, RoundId(consortium.bundle.digest, "", number), step)
    return ledger


def test_a_withdrawn_study_gives_back_what_it_reserved_and_did_not_run(consortium, plain):
    ledger = _planned(consortium)
    folder = consortium.publish()
    assert plain("approve", folder, "--by", "Dr. Grey")[0] == 0
    assert ledger.events("train")[0].steps == 5
    status, told = plain("withdraw", consortium.bundle.study.name)
    assert (status, told["budget_given_back"]) == (0, True)
    assert (ledger.events("train")[0].steps, ledger.open_plans()) == (2, ())
    ledger.close()
    assert plain("approve", folder, "--by", "Dr. Grey")[0] == 0
    assert plain("withdraw", consortium.bundle.study.name)[1]["budget_given_back"] is False


def test_a_ledger_that_is_held_does_not_keep_an_approval_from_being_taken_back(
    consortium, plain, monkeypatch
):
    def held(*_arguments, **_options):
        raise StorageError(Code.LEDGER_BUSY, "held")

    ledger = _planned(consortium)
    assert plain("approve", consortium.publish(), "--by", "Dr. Grey")[0] == 0
    monkeypatch.setattr(Ledger, "settle_plan", held)
    status, told = plain("withdraw", consortium.bundle.study.name)
    assert (status, told["budget_given_back"]) == (0, None)
    assert not HospitalFolder(consortium.state("north")).approved()
    assert ledger.events("train")[0].steps == 5
    monkeypatch.undo()
    # The next start gives it back; a plan of an approved study stays.
    assert settle_unapproved(ledger, HospitalFolder(consortium.state("north"))) == 1
    assert ledger.events("train")[0].steps == 2
    ledger.close()


def test_the_daemon_gives_back_the_plans_of_studies_that_nobody_approves_any_more(consortium):
    consortium.approve("north")
    ledger = _planned(consortium)
    ledger.reserve_plan(bytes(32), "", [Charge("train", "train", (DpEvent(9.0, 1.0, 3),))], "s")
    host = consortium.host("north")
    host._population()
    assert [plan.study for plan in ledger.open_plans()] == [consortium.bundle.digest]
    ledger.close()


def test_what_is_not_approved_cannot_be_taken_back(consortium, plain):
    for name in ("no-such-study", "0" * 16, ""):
        status, told = plain("withdraw", name)
        assert (status, told["error"]["code"]) == (4, Code.APPROVAL_STUDY.label)


def test_review_then_approve_then_approve_again(consortium, verb, plain):
    folder = consortium.publish()
    status, out, _ = verb("review", folder)
    assert status == 0
    assert f'wardround client approve {folder} --by "YOUR NAME"' in out
    status, told = plain("approve", folder, "--by", "Dr. Grey")
    assert (status, told["by"], told["new"]) == (0, "Dr. Grey", True)
    status, told = plain("approve", folder, "--by", "Dr. Who")
    assert (status, told["by"], told["new"]) == (0, "Dr. Grey", False)
    status, out, _ = verb("review", folder)
    assert "approved   by Dr. Grey" in out


def test_a_review_with_an_objection_ends_as_refused(consortium, verb, plain):
    consortium.change("north", ceilings={"epsilon": 1})
    folder = consortium.publish()
    status, out, _ = verb("review", folder)
    assert status == 4
    assert Code.APPROVAL_EPSILON.label in out
    assert "approve" not in out.splitlines()[-1]
    status, told = plain("review", folder)
    assert (status, told["objections"][0]["code"]) == (4, Code.APPROVAL_EPSILON.label)
    status, told = plain("approve", folder, "--by", "Dr. Grey")
    assert (status, told["error"]["code"]) == (4, Code.APPROVAL_EPSILON.label)


def test_an_approval_needs_a_name(consortium, verb):
    folder = consortium.publish()
    assert verb("approve", folder)[0] == 2
    assert verb("approve", folder, "--by", " ")[0] != 0
    assert not list(consortium.state("north").glob("studies/*"))


# ---------------------------------------------------------------------------- stop, start, status


def test_stop_and_start_are_a_file(consortium, verb, plain):
    switch = consortium.state("north") / "stop"
    assert plain("stop") == (0, {"stopped": True, "kill_switch": str(switch)})
    assert switch.exists()
    assert verb("stop")[0] == 0
    assert plain("status")[1]["stopped"] is True
    assert "kill switch is on" in verb("review", consortium.publish())[1].lower()
    assert plain("start")[1]["stopped"] is False
    assert not switch.exists()
    assert verb("start")[0] == 0


def test_status_tells_of_studies_ledger_and_daemon(consortium, verb, plain, local):
    status, told = plain("status")
    assert (status, told["running"], told["studies"], told["ledger"]) == (0, False, [], None)
    consortium.approve("north")
    host = consortium.host("north", maker=local)
    host.ask(consortium.bundle.digest, (), hello=True)
    status, told = plain("status")
    assert told["running"] is True
    assert told["ledger"] == {"epsilon": 0.0, "cap": 12, "left": 12, "delta": 1e-5, "rows": 1}
    (study,) = told["studies"]
    assert (study["name"], study["approved_by"], study["finished"]) == (
        "tabular",
        "Dr. Grey",
        False,
    )
    consortium.close()
    assert plain("status")[1]["running"] is False
    (consortium.state("north") / "studies" / study["folder"] / "approval.json").write_text("{}")
    assert plain("status")[1]["studies"][0]["code"] == Code.APPROVAL_FORGED.label
    assert Code.APPROVAL_FORGED.label in verb("status")[1]


def test_health_means_that_the_heartbeat_is_fresh(consortium, verb, plain):
    assert plain("health") == (1, {"fresh": False, "heartbeat_age_s": None})
    beat = consortium.state("north") / "heartbeat.json"
    beat.write_text(json.dumps({"at": unix_seconds()}))
    assert verb("health")[0] == 0
    beat.write_text(json.dumps({"at": unix_seconds() - FRESH_SECONDS - 5}))
    assert verb("health")[0] == 1
    assert verb("health", "--age", "100000")[0] == 0
    beat.write_text("{")
    assert plain("health")[1]["heartbeat_age_s"] is None


def test_logs_are_shown_for_people_and_for_programs(consortium, verb, plain):
    assert verb("logs") == (0, "", "")
    log = open_log(consortium.state("north") / "log.jsonl")
    for number in range(5):
        log.info("round.started", round=number)
    status, out, _ = verb("logs", "-n", "2")
    assert status == 0
    assert [line.split("  ")[-1] for line in out.splitlines()] == ["round=3", "round=4"]
    assert [entry["round"] for entry in plain("logs", "-n", "3")[1]["lines"]] == [2, 3, 4]


def test_following_goes_on_over_half_lines_and_rotation(tmp_path):
    path = tmp_path / "log"
    path.write_text("old\n")
    steps = iter(
        [
            lambda: path.open("a").close(),
            lambda: _append(path, "one\ntw"),
            lambda: _append(path, "o\n"),
            path.unlink,
            lambda: path.write_text("new\n"),
        ]
    )

    def step():
        next(steps)()

    lines = follow(path, step)
    assert [next(lines) for _ in range(3)] == ["one", "two", "new"]


def _append(path, text):
    with path.open("a") as file:
        file.write(text)


# ---------------------------------------------------------------------------- the daemon


class FakeLine:
    """A line that is told what to say of itself."""

    def __init__(self, code=None, beat=lambda: None):
        self.code, self.beat, self.ran = code, beat, threading.Event()

    def run(self, stop):
        self.beat()
        self.ran.set()
        stop.wait(60)

    def state(self):
        return LinkState(self.code is None, 1.0, 2.0, "", self.code, 3, 4, 0.5)


def test_the_daemon_beats_tells_and_ends(consortium, local, monkeypatch):
    monkeypatch.setattr("client.operate._TICK_S", 0.01)
    host = consortium.host("north", maker=local)
    log = open_log(host.folder.log, strict=True)
    made = []

    def make(key, beat):
        made.append(FakeLine(beat=beat))
        return made[-1]

    operation = Operation(host, (Path("a.key"),), make, log)
    thread = threading.Thread(target=operation.run)
    thread.start()
    while not made or not made[0].ran.wait(60):
        pass
    assert heartbeat_age(host.folder, unix_seconds()) <= 60
    operation.stop()
    thread.join(60)
    assert not thread.is_alive()
    told = json.loads(host.folder.status.read_text())
    assert (told["running"], told["link"]["bytes_up"], told["link"]["code"]) == (False, 3, None)
    assert host.stopped()
    events = [json.loads(line)["event"] for line in host.folder.log.read_text().splitlines()]
    assert events == ["daemon.started", "daemon.stopped"]


def test_a_key_that_is_not_admitted_yet_gives_way_to_the_older_one(consortium, local, monkeypatch):
    monkeypatch.setattr("client.operate._TICK_S", 0.001)
    host = consortium.host("north", maker=local)
    tried = []

    class Known(FakeLine):
        def run(self, stop):
            # However often it is looked at, a line that is known is kept.
            for _ in range(100):
                operation._tick(stop)
            assert not stop.is_set()
            operation.stop()
            stop.wait(60)

    def make(key, beat):
        tried.append(key.name)
        return Known() if key.name == "old.key" else FakeLine(Code.NOT_ADMITTED)

    keys = (Path("new.key"), Path("old.key"))
    operation = Operation(host, keys, make, open_log(host.folder.log))
    operation.run()
    assert tried == ["new.key", "old.key"]


def test_the_only_key_is_kept_however_long_it_is_not_admitted(consortium, local):
    host = consortium.host("north", maker=local)
    operation = Operation(host, (Path("a.key"),), lambda key, beat: None, open_log(host.folder.log))
    operation._line = FakeLine(Code.NOT_ADMITTED)
    ended = threading.Event()
    for _ in range(100):
        operation._tick(ended)
    assert not ended.is_set()


def test_a_full_disk_does_not_end_a_daemon_that_only_wants_to_say_so(
    consortium, local, monkeypatch
):
    host = consortium.host("north", maker=local)
    operation = Operation(host, (), lambda key, beat: FakeLine(), open_log(host.folder.log))

    def full(*_args, **_options):
        from common.errors import StorageError

        raise StorageError(Code.JOURNAL_WRITE, "full")

    monkeypatch.setattr("client.operate.write_durably", full)
    operation._write_status(running=True)


def test_client_run_waits_for_its_coordinator_and_ends_on_a_signal(consortium, tmp_path):
    """A real process: nobody answers, the status says so, SIGTERM ends it cleanly."""
    from client.enrol import PIN_FILE, _write_transport
    from common.keys import key_file

    state = consortium.state("north")
    _write_transport(state / "transport.key")
    pin = json.loads((state / PIN_FILE).read_text()) | {"url": "127.0.0.1:1"}
    (state / PIN_FILE).write_text(json.dumps(pin))
    _authority(state / "ca.crt")
    daemon = subprocess.Popen(
        [sys.executable, "-m", "common.cli", "client", "run", "--config", consortium.yaml("north")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = HospitalFolder(state)
    try:
        while daemon.poll() is None and not _waiting(folder):
            threading.Event().wait(0.05)
        assert daemon.poll() is None, daemon.stderr.read()
        # No secret is where other users of the machine may look.
        for name in ("cmdline", "environ"):
            shown = Path(f"/proc/{daemon.pid}/{name}").read_bytes()
            for secret in ("identity.key", "vault.key", "transport.key"):
                assert key_file(state / secret) not in shown
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(60) == 0
    finally:
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
        daemon.stderr.close()
    assert json.loads(folder.status.read_text())["running"] is False
    assert not folder.heartbeat.exists()


def _waiting(folder):
    try:
        link = json.loads(folder.status.read_text())["link"]
    except (OSError, ValueError):
        return False
    return link["code"] == Code.UNREACHABLE.label


def _authority(path):
    """Any certificate: nobody is reached under it."""
    import datetime as dt

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    day = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(day)
        .not_valid_after(day + dt.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA384())
    )
    path.write_bytes(made.public_bytes(Encoding.PEM))


@pytest.mark.parametrize("name", ["status", "health", "logs", "stop", "start"])
def test_small_verbs_load_neither_numpy_nor_flower(consortium, name):
    program = (
        "import sys; from common.cli import main; "
        f"main(['client', {name!r}, '--config', {str(consortium.yaml('north'))!r}]); "
        "heavy = {'torch', 'flwr', 'dp_accounting', 'scipy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_verbs_that_train_nothing_are_registered(wardround):
    _, out, _ = wardround("--help")
    for name in (
        "review",
        "approve",
        "withdraw",
        "run",
        "stop",
        "start",
        "status",
        "logs",
        "health",
    ):
        assert f"wardround client {name}" in out
