"""A coordinator's run folder: made from what was published, gone on with, and told about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.bundle import resolve
from common.cli import main
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError
from common.logs import open_log
from common.offer import Offer
from common.roster import Roster
from common.study import Study
from common.world import SeededEntropy, write_durably
from server.deploy import CoordinatorRun, Heard, Published, prepare, run_folder, runs
from server.watch import Health

SITES = ("east", "north", "south", "west")
BOSS = SiteKey.generate(SeededEntropy("coordinator"))
KEYS = {site: SiteKey.generate(SeededEntropy(site)) for site in SITES}


def study(**changes):
    plain = {
        "format": "wardround-study/1",
        "name": "lungs",
        "task": {"kind": "diagnosis", "labels": ("a", "b")},
        "model": {"backbone": "package:x/y"},
        "training": {"rounds": 2},
        "privacy": {"mode": "none"},
        "sites": tuple({"id": site} for site in SITES),
    }
    return Study.model_validate({**plain, **changes})


@pytest.fixture(scope="module")
def bundle():
    weights = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}
    return resolve(study(), weights, bytes(32), "{}")


@pytest.fixture
def published(tmp_path, bundle):
    """A bundle folder as the coordinator hands it out."""
    folder = tmp_path / "bundle"
    bundle.save(folder)
    roster = Roster.of({site: key.public for site, key in KEYS.items()}, 4)
    roster.signed(BOSS).save(folder / "roster.json")
    Offer.sign(BOSS, bundle.digest, roster.digest()).save(folder / "offer.json")
    return folder


def test_a_published_bundle_becomes_one_run_for_good(tmp_path, published, bundle):
    state = tmp_path / "state"
    folder = prepare(state, published, BOSS.public)
    assert folder == run_folder(state, bundle)
    began = folder.started.read_text()
    assert prepare(state, published, BOSS.public) == folder
    assert folder.started.read_text() == began
    assert runs(state) == (folder,)
    assert Published.load(folder.bundle, BOSS.public).keys == {s: k.public for s, k in KEYS.items()}


def test_a_copy_that_was_interrupted_is_made_anew(tmp_path, published, bundle):
    state = tmp_path / "state"
    half = run_folder(state, bundle).bundle
    half.mkdir(parents=True)
    (half / "leftover").write_text("half of something")
    folder = prepare(state, published, BOSS.public)
    assert not (folder.bundle / "leftover").exists()


def unpublished(folder: Path) -> None:
    (folder / "offer.json").unlink()


def of_another(folder: Path) -> None:
    other = SiteKey.generate(SeededEntropy("another coordinator"))
    roster = Roster.of({site: key.public for site, key in KEYS.items()}, 4)
    roster.signed(other).save(folder / "roster.json")


def without_a_site(folder: Path) -> None:
    roster = Roster.of({site: KEYS[site].public for site in SITES[1:]}, 4)
    roster.signed(BOSS).save(folder / "roster.json")
    offer = json.loads((folder / "offer.json").read_text())
    digest = bytes.fromhex(offer["study"])
    (folder / "offer.json").unlink()
    Offer.sign(BOSS, digest, roster.digest()).save(folder / "offer.json")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (unpublished, Code.NOT_PUBLISHED),
        (of_another, Code.ROSTER_SIGNATURE),
        (without_a_site, Code.NOT_PUBLISHED),
    ],
    ids=["no offer", "another coordinator's roster", "a site that was never admitted"],
)
def test_what_this_coordinator_did_not_publish_is_not_run(tmp_path, published, damage, code):
    damage(published)
    with pytest.raises(ConfigError) as caught:
        prepare(tmp_path / "state", published, BOSS.public)
    assert caught.value.code is code
    assert runs(tmp_path / "state") == ()


@pytest.fixture
def run(tmp_path, published):
    folder = prepare(tmp_path / "state", published, BOSS.public)
    made = CoordinatorRun(folder, BOSS, log=open_log(tmp_path / "log.jsonl", strict=True))
    yield made
    made.close()


class Silent:
    def send(self, recipient, payload):
        """Nobody is there."""


def test_a_status_says_who_is_awaited_and_until_when(run):
    driver = run.driver(Silent())
    driver.start()
    heard = {"east": Heard(True, 0.0, True, 10, 20), "north": Heard(True, 0.0, code="WR-3101")}
    status = run.status(heard, revoked=("west",))
    assert status.phase == "handshake"
    assert status.waiting_for == SITES
    assert 0 < status.deadline <= run.study.deadlines.handshake_s
    assert {site.site: site.state for site in status.sites} == {
        "east": "asked", "north": "waiting", "south": "offline", "west": "revoked",
    }  # fmt: skip
    assert (status.completed, status.aborted, status.ends) == (0, 0, None)


def test_a_run_folder_has_one_process(run):
    with pytest.raises(StorageError) as caught:
        CoordinatorRun(run.folder, BOSS, log=open_log(run.folder.root / "log.jsonl"))
    assert caught.value.code is Code.FOLDER_IN_USE


# ------------------------------------------------------------------------- the verbs


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "coordinator.yaml"
    path.write_text("format: wardround-coordinator/1\nstate: state\n")
    return path


def told(capsys, *words):
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("verb", ["status", "resume", "report"])
def test_without_a_run_the_verbs_say_how_to_start_one(capsys, config, verb):
    status, found = told(capsys, "server", verb, "--config", str(config))
    assert status == 7
    assert found["error"]["code"] == Code.NOT_A_RUN.label
    assert "server run" in found["error"]["remedy"]


def test_a_report_of_a_run_that_goes_on_says_so(capsys, config, published):
    prepare(config.parent / "state", published, BOSS.public)
    status, found = told(capsys, "server", "report", "--config", str(config))
    assert status == 7
    assert found["error"]["code"] == Code.RUN_UNFINISHED.label
    _, unknown = told(capsys, "server", "report", "no-such-run", "--config", str(config))
    assert unknown["error"]["code"] == Code.NOT_A_RUN.label


def test_a_report_says_again_what_was_concluded(capsys, config, published):
    folder = prepare(config.parent / "state", published, BOSS.public)
    shutil.copy(published / "offer.json", folder.root / "kept")
    concluded = {"summary": {"audit_verified": True}, "rows": [], "lines": ["fine"], "good": True}
    write_durably(folder.conclusion, [json.dumps(concluded).encode()])
    assert main(["server", "report", "--config", str(config)]) == 0
    assert capsys.readouterr().out.splitlines() == ["fine"]


def test_health_without_a_coordinator_is_not_serving(capsys, config):
    free = Health(0)
    free.stop()
    config.write_text(f"{config.read_text()}admin: {{health: {free.port}}}\n")
    status, found = told(capsys, "server", "health", "--config", str(config))
    assert (status, found) == (1, {"serving": False})
