"""The host of a hospital: what it answers, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from client.approval import Approval
from client.hospital import HospitalHost
from client.privacy.ledger import Ledger
from client.trainer import TrainerProcess
from common.audit import verify
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, RefusedError, StorageError
from common.tensors import load_tensors
from common.world import SystemEntropy, WallClock

SITES = ("east", "north", "south", "west")


def ready(consortium, local, **makers):
    for site in SITES:
        consortium.approve(site)
        consortium.host(site, maker=makers.get(site, local))


def study_folder(consortium, site):
    return consortium.state(site) / "studies" / consortium.bundle.digest.hex()[:16]


def ask(host, consortium, *payloads, hello=True):
    return host.ask(consortium.bundle.digest, payloads, hello=hello)


# ---------------------------------------------------------------------------- a whole run


def test_a_whole_study_runs_and_leaves_model_and_statement(consortium, fleet, local):
    ready(consortium, local)
    fleet.run()
    assert fleet.codes == []
    assert [r.kind for r in fleet.completed] == ["statistics", "train", "train", "evaluate"]
    for site in SITES:
        folder = study_folder(consortium, site)
        assert (folder / "model" / "model.safetensors").is_file()
        told = json.loads((folder / "privacy.json").read_text())
        assert 0 < told["epsilon_spent"]["training"] <= told["epsilon_agreed"] == 8
        assert told["rounds_charged"] == 4
        # One ledger for the population, under its own delta and cap.
        ledger = Ledger.open_existing(consortium.state(site) / "ledger.sqlite", clock=WallClock())
        spent = ledger.spent()
        ledger.close()
        assert (spent.cap, spent.delta) == (12, 1e-5)
        assert spent.train >= told["epsilon_spent"]["training"] - 1e-9
    facts = consortium.hosts["north"].facts()
    assert [(s["completed"], s["code"]) for s in facts["studies"]] == [(4, "")]
    # The audit log of the run is closed, whole and signed by this hospital.
    consortium.close()
    log = study_folder(consortium, "north") / "audit" / "north.jsonl"
    assert verify(log, consortium.keys["north"].public).complete
    assert not verify(log, consortium.keys["south"].public).complete


def test_layers_of_its_own_stay_at_a_hospital_and_come_out_in_its_model(
    consortium, bundle_of, local, request
):
    consortium.bundle = bundle_of(training={"rounds": 2, "local_steps": 2, "personal": ["head"]})
    fleet = request.getfixturevalue("fleet")
    ready(consortium, local)
    fleet.run()
    assert fleet.codes == []
    assert {spec.name for spec in consortium.bundle.layout.specs} == {
        "hidden1.bias",
        "hidden1.weight",
    }
    models = [
        load_tensors(study_folder(consortium, site) / "model" / "model.safetensors")
        for site in SITES
    ]
    for name in consortium.bundle.initial:
        alike = all(np.array_equal(model[name], models[0][name]) for model in models)
        assert alike == name.startswith("hidden1")


def test_a_hospital_goes_on_from_its_journal_after_its_daemon_died(consortium, fleet, local):
    ready(consortium, local)
    fleet.run(rounds=2)
    rows = {}
    for site in SITES:
        before = consortium.hosts[site]
        rows[site] = before._ledger.counter
        consortium.host(site, maker=local)
    assert all(rows.values())
    for site in SITES:
        fleet.network.sites[site].start()
    while fleet.final is None:
        fleet.network.step()
    assert len(fleet.completed) == 4


# ---------------------------------------------------------------------------- the trainer's death


class Dying(TrainerProcess):
    """Killed -9 in the middle of its first training."""

    def train(self, state, round_number):
        if self.starts == 1:
            os.kill(self.pid, signal.SIGSTOP)
            threading.Timer(0.2, os.kill, (self.pid, signal.SIGKILL)).start()
        return super().train(state, round_number)


def test_a_trainer_killed_in_a_round_costs_that_round_and_the_next_has_a_new_one(
    consortium, fleet, local, tmp_path
):
    made = []

    def dying(task):
        made.append(Dying(task, log=tmp_path / "trainer.log"))
        return made[-1]

    ready(consortium, local, north=dying)
    fleet.run()
    (trainer,) = made
    assert trainer.starts == 2
    # The coordinator learns that the hospital sat a round out, and not why.
    assert ("north", Code.DATA_DECLINED) in fleet.codes or any(
        "north" not in r.survivors for r in fleet.completed
    )
    assert all("north" in r.survivors for r in (fleet.completed[0], fleet.completed[-1]))
    assert "north" not in fleet.completed[1].survivors
    told = (study_folder(consortium, "north") / "audit" / "north.jsonl").read_text()
    assert Code.TRAINER_LOST.label in told
    assert Code.TRAINER_LOST.label not in "".join(code.label for _, code in fleet.codes)
    # What was reserved before the child died stays charged: four rounds took part, one in vain.
    statement = json.loads((study_folder(consortium, "north") / "privacy.json").read_text())
    assert statement["rounds_charged"] == 4


def test_the_daemon_imports_neither_torch_nor_flower_nor_a_patient(consortium, tmp_path):
    """A whole piece of work in a process of its own, with the real child."""
    consortium.approve("north")
    program = f"""
import sys
from pathlib import Path
from client.config import SiteConfig
from client.hospital import HospitalHost
from client.round.effects import Work
from common.config import load
path = Path({str(consortium.yaml("north"))!r})
host = HospitalHost(load(path, SiteConfig), path, coordinator=bytes.fromhex({consortium.coordinator.public.hex()!r}))
study = bytes.fromhex({consortium.bundle.digest.hex()!r})
assert len(host.ask(study, (), hello=True).payloads) == 1
opened = host._opened(study)
bundle = opened.approved.bundle
state = dict(bundle.terms(opened.approved.roster).initial)
worked = opened.site.worker.work(Work(1, 2, state, trains=True, measures=True))
assert worked.update.shape == (bundle.layout.size,) and worked.metrics is not None
assert host.facts()["trainers"][0]["pid"]
host.close()
loaded = set(sys.modules)
assert not loaded & {{"torch", "flwr", "opacus", "transformers", "pyarrow"}}, loaded
import gc
from client.data.records import Record
assert not any(isinstance(thing, Record) for thing in gc.get_objects())
print(len(worked.update))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().isdigit()


# ---------------------------------------------------------------------------- what is refused


def test_nothing_runs_unapproved(consortium, local):
    host = consortium.host("north", maker=local)
    with pytest.raises(RefusedError) as refused:
        ask(host, consortium)
    assert refused.value.code is Code.APPROVAL_STUDY
    assert not consortium.state("north").joinpath("studies").exists()
    # Control: approved while the daemon runs, it answers.
    assert consortium.approve("north")
    assert len(ask(host, consortium).payloads) == 1


def test_a_list_in_site_yaml_is_no_approval(consortium, local):
    consortium.change("north", ceilings={"approved_studies": "any"})
    with pytest.raises(RefusedError):
        ask(consortium.host("north", maker=local), consortium)


def test_an_approval_that_is_taken_away_stops_the_study_at_once(consortium, local):
    consortium.approve("north")
    host = consortium.host("north", maker=local)
    assert ask(host, consortium).payloads
    (study_folder(consortium, "north") / "approval.json").unlink()
    with pytest.raises(RefusedError) as refused:
        ask(host, consortium)
    assert refused.value.code is Code.APPROVAL_STUDY


def _edit(**changes):
    def tamper(consortium, folder):
        path = folder / "approval.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return tamper


def _other_hospital(consortium, folder):
    consortium.approve("south")
    other = study_folder(consortium, "south") / "approval.json"
    shutil.copy(other, folder / "approval.json")


def _self_made(consortium, folder):
    """By somebody who can write into the state folder but has another key."""
    known = Approval.load(folder / "approval.json")
    known.signed(SiteKey.generate(SystemEntropy())).save(folder / "approval.json")


def _other_roster(consortium, folder):
    """A newer roster of the same coordinator: what was approved is the older one."""
    newer = consortium.publish(name="newer", version=2)
    for name in ("roster.json", "offer.json"):
        shutil.copy(newer / name, folder / "bundle" / name)


def _rogue_roster(consortium, folder):
    rogue = SiteKey.generate(SystemEntropy())
    shutil.copytree(
        consortium.publish(name="rogue", signer=rogue), folder / "bundle", dirs_exist_ok=True
    )


def _other_weights(consortium, folder):
    path = folder / "bundle" / "bundle.json"
    path.write_text(path.read_text().replace('"noise_multiplier": ', '"noise_multiplier": 0'))


TAMPERED = [
    (_edit(by="Dr. No"), Code.APPROVAL_FORGED),
    (_edit(epsilon=99.0), Code.APPROVAL_FORGED),
    (_edit(code="00" * 32), Code.APPROVAL_FORGED),
    (_edit(study="00" * 32), Code.APPROVAL_FORGED),
    (_edit(roster="00" * 32), Code.APPROVAL_FORGED),
    (_edit(at=0), Code.APPROVAL_FORGED),
    (_edit(signature="00" * 64), Code.APPROVAL_FORGED),
    (_edit(extra=1), Code.APPROVAL_FORGED),
    (_edit(format="wardround-approval/2"), Code.APPROVAL_FORGED),
    (_other_hospital, Code.APPROVAL_FORGED),
    (_self_made, Code.APPROVAL_FORGED),
    (_other_roster, Code.APPROVAL_FORGED),
    (_rogue_roster, Code.ROSTER_SIGNATURE),
    (_other_weights, Code.BUNDLE_DAMAGED),
]


@pytest.mark.parametrize(("tamper", "code"), TAMPERED)
def test_an_approval_that_was_touched_approves_nothing(consortium, local, tamper, code):
    consortium.approve("north")
    tamper(consortium, study_folder(consortium, "north"))
    with pytest.raises((RefusedError, ConfigError, StorageError)) as refused:
        ask(consortium.host("north", maker=local), consortium)
    assert refused.value.code is code


def test_an_approval_is_not_for_a_study_whose_digest_begins_alike(consortium, local):
    consortium.approve("north")
    host = consortium.host("north", maker=local)
    near = consortium.bundle.digest[:8] + bytes(24)
    with pytest.raises(RefusedError) as refused:
        host.ask(near, (), hello=True)
    assert refused.value.code is Code.APPROVAL_STUDY


def test_code_that_is_not_what_was_approved_does_no_work(consortium, fleet, local, monkeypatch):
    ready(consortium, local)
    monkeypatch.setattr("client.hospital.code_digest", lambda packages: bytes(32))
    consortium.host("north", maker=local)
    fleet.run()
    assert fleet.final is not None
    assert all("north" not in r.survivors for r in fleet.completed)
    assert ("north", Code.APPROVAL_CODE) in fleet.codes or Code.APPROVAL_CODE.label in (
        study_folder(consortium, "north") / "audit" / "north.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    ("ceilings", "code"),
    [
        ({"epsilon": 7.9}, Code.APPROVAL_EPSILON),
        ({"delta": 1e-6}, Code.APPROVAL_DELTA),
        ({"rounds": 1}, Code.APPROVAL_ROUNDS),
        ({"minimum_sites": 5}, Code.APPROVAL_PARTIES),
        ({"approved_backbones": []}, Code.APPROVAL_BACKBONE),
        ({"approved_code": []}, Code.APPROVAL_CODE),
    ],
)
def test_a_ceiling_that_is_lowered_after_the_approval_binds(
    consortium, fleet, local, ceilings, code
):
    ready(consortium, local)
    consortium.change("north", ceilings=ceilings)
    consortium.host("north", maker=local)
    fleet.run(rounds=1)
    assert "north" not in fleet.completed[0].survivors
    audit = (study_folder(consortium, "north") / "audit" / "north.jsonl").read_text()
    assert code.label in audit
    assert not (consortium.state("north") / "ledger.sqlite").exists() or code.label in audit


def test_while_the_kill_switch_is_on_nothing_leaves(consortium, fleet, local):
    ready(consortium, local)
    switch = consortium.state("north") / "stop"
    switch.touch()
    for hello in (True, False):
        answer = ask(consortium.hosts["north"], consortium, hello=hello)
        assert (answer.payloads, answer.code) == ((), Code.APPROVAL_STOPPED)
    fleet.run(rounds=1)
    assert "north" not in fleet.completed[0].survivors
    switch.unlink()
    fleet.network.sites["north"].start()
    while fleet.final is None:
        fleet.network.step()
    assert "north" in fleet.completed[-1].survivors


class Pressed:
    """The kill switch is pressed while the trainer works."""

    def __init__(self, inner, switch):
        self._inner, self._switch = inner, switch

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def statistics(self):
        self._switch.touch()
        return self._inner.statistics()


def test_a_switch_pressed_during_the_work_keeps_its_result_here(consortium, fleet, local):
    switch = consortium.state("north") / "stop"
    ready(consortium, local, north=lambda task: Pressed(local(task), switch))
    fleet.run(rounds=1)
    assert ("north", Code.APPROVAL_STOPPED) in fleet.codes
    assert "north" not in fleet.completed[0].survivors


def test_a_budget_that_is_spent_declines_the_round(consortium, fleet, local):
    ready(consortium, local)
    consortium.change("north", budget={"epsilon": 0.5}, ceilings={"epsilon": 0.5})
    # The ceilings would refuse the study, too: they are put aside to see the ledger's own cap.
    host = consortium.host("north", maker=local)
    host._config = host._config.model_copy(
        update={"ceilings": host._config.ceilings.model_copy(update={"epsilon": 10.0})}
    )
    fleet.run(rounds=1)
    assert ("north", Code.BUDGET_EXCEEDED) in fleet.codes or Code.BUDGET_EXCEEDED.label in (
        study_folder(consortium, "north") / "audit" / "north.jsonl"
    ).read_text()
    assert "north" not in fleet.completed[0].survivors


# ---------------------------------------------------------------------------- the folder


def test_one_daemon_holds_a_state_folder(consortium, local):
    consortium.host("north", maker=local)
    with pytest.raises(StorageError) as refused:
        HospitalHost(
            consortium.config("north"),
            consortium.yaml("north"),
            coordinator=consortium.coordinator.public,
        )
    assert refused.value.code is Code.FOLDER_IN_USE
    consortium.close("north")
    consortium.host("north", maker=local)


def test_a_hospital_without_its_identity_does_not_make_another(consortium):
    (consortium.state("north") / "identity.key").unlink()
    with pytest.raises(StorageError):
        consortium.host("north")
    assert not (consortium.state("north") / "identity.key").exists()
    # And the folder is free again.
    (consortium.state("north") / "identity.key").write_bytes(bytes(32))
    (consortium.state("north") / "identity.key").chmod(0o600)
    consortium.host("north")


def test_a_full_disk_ends_the_question_and_not_the_hospital(consortium, local, monkeypatch):
    consortium.approve("north")
    host = consortium.host("north", maker=local)
    assert ask(host, consortium).payloads

    def full(self, record):
        raise StorageError(Code.JOURNAL_WRITE, "full")

    opened = host._opened(consortium.bundle.digest)
    monkeypatch.setattr(opened.site.daemon, "receive", lambda payload: full(None, None))
    with pytest.raises(StorageError):
        ask(host, consortium, b"x", hello=False)
    assert ask(host, consortium).payloads


def test_a_study_under_an_older_key_is_answered_under_it(consortium, local):
    """After a rotation: the newest key signs what is new, the study's own key its own study."""
    consortium.approve("north")
    state = consortium.state("north")
    (state / "identity.key").rename(state / "identity-1.key")
    newer = SiteKey.generate(SystemEntropy())
    (state / "identity.key").write_bytes(newer.seed())
    (state / "identity.key").chmod(0o600)
    host = consortium.host("north", maker=local)
    study = consortium.bundle.digest
    assert host.key.public == newer.public
    assert host.key_for(study).public == newer.public
    assert ask(host, consortium).payloads
    assert host.key_for(study).public == consortium.keys["north"].public


def test_a_study_that_could_not_be_opened_can_be_opened_later(consortium, local):
    """What was half open is let go of: no lock stays behind in a daemon that lives on."""
    consortium.approve("north")
    audit = study_folder(consortium, "north") / "audit"
    audit.mkdir()
    (audit / "north.jsonl").write_text("this is no log\n")
    host = consortium.host("north", maker=local)
    for _ in range(2):
        with pytest.raises(StorageError) as refused:
            ask(host, consortium)
        assert refused.value.code is Code.AUDIT_BROKEN
    (audit / "north.jsonl").unlink()
    assert ask(host, consortium).payloads


def test_a_bug_in_one_question_leaves_nothing_half_done_for_the_next(
    consortium, local, monkeypatch
):
    consortium.approve("north")
    host = consortium.host("north", maker=local)
    ask(host, consortium)
    opened = host._opened(consortium.bundle.digest)
    monkeypatch.setattr(opened.site.daemon, "receive", lambda payload: {}["bug"])
    opened.outbox.sent.append(b"half")
    with pytest.raises(KeyError):
        ask(host, consortium, b"x", hello=False)
    assert len(ask(host, consortium).payloads) == 1
    assert host._opened(consortium.bundle.digest) is not opened


def test_without_privacy_a_key_of_the_hospital_divides_its_patients(
    consortium, bundle_of, local, tmp_path
):
    none = dict.fromkeys(("epsilon", "delta", "clip_norm", "statistics_epsilon"))
    consortium.bundle = bundle_of(privacy={"mode": "none", **none})
    consortium.change("north", ceilings={"require_privacy": False})
    consortium.approve("north")
    tasks = []

    def kept(task):
        tasks.append(task)
        return local(task)

    for _ in range(2):
        host = consortium.host("north", maker=kept)
        ask(host, consortium)
        host._opened(consortium.bundle.digest).site.setup.trainer()
    first, second = tasks
    assert first.split_key == second.split_key
    assert (consortium.state("north") / "split.key").stat().st_mode & 0o077 == 0
    assert not (consortium.state("north") / "ledger.sqlite").exists()
    # Control: another hospital divides by another key.
    consortium.change("south", ceilings={"require_privacy": False})
    consortium.approve("south")
    host = consortium.host("south", maker=kept)
    ask(host, consortium)
    host._opened(consortium.bundle.digest).site.setup.trainer()
    assert tasks[-1].split_key != first.split_key
