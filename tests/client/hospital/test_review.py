"""What a person is shown, what is hidden from him, and what his approval leaves behind."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.approval import Approval
from client.budget import forecast_study
from client.data.records import Record
from client.review import SMALL, render, review, shown_counts
from common.crypto.identity import SiteKey, fingerprint
from common.errors import Code, WardroundError
from common.world import SystemEntropy


def reviewed(consortium, folder=None, site="north", **options):
    folder = consortium.publish() if folder is None else folder
    return review(folder, consortium.config(site), consortium.yaml(site), **options)


def codes(found):
    return [objection.code for objection in found.objections]


def test_a_person_sees_what_would_run_and_nothing_is_founded_by_looking(consortium):
    before = sorted(path.name for path in consortium.state("north").iterdir())
    found = reviewed(consortium, megabits=1.0)
    assert codes(found) == []
    text = render(found)
    for shown in (
        consortium.bundle.digest.hex(),
        found.code.hex(),
        consortium.bundle.backbone_digest.hex(),
        "60 qualify",
        "the ceiling is 10",
        "cap 12, left 4.000",
        "a round needs 3, so 1 may be missing",
        *(f"{name}  {fingerprint(key.public)}" for name, key in consortium.keys.items()),
    ):
        assert shown in text
    assert found.forecast.own == pytest.approx(8.0, abs=0.01)
    assert found.minutes > 0
    json.dumps(found.to_json(), allow_nan=False)
    assert sorted(path.name for path in consortium.state("north").iterdir()) == before


def test_a_slower_line_takes_longer(consortium):
    fast, slow = (reviewed(consortium, megabits=rate).minutes for rate in (1000.0, 0.001))
    assert slow > 10 * fast


OBJECTIONS = [
    ({"ceilings": {"epsilon": 7.9}}, Code.APPROVAL_EPSILON),
    ({"ceilings": {"delta": 9e-6}}, Code.APPROVAL_DELTA),
    ({"budget": {"delta": 9e-6}}, Code.APPROVAL_DELTA),
    ({"ceilings": {"rounds": 1}}, Code.APPROVAL_ROUNDS),
    ({"ceilings": {"minimum_sites": 5}}, Code.APPROVAL_PARTIES),
    ({"ceilings": {"approved_backbones": ["00" * 32]}}, Code.APPROVAL_BACKBONE),
    ({"ceilings": {"approved_code": ["00" * 32]}}, Code.APPROVAL_CODE),
    ({"data": {"files": ["other.csv"]}}, Code.DATA_UNREADABLE),
    ({"data": {"columns": {"patient": "pid", "label": "age"}}}, Code.DATA_LABEL),
    ({"data": {"columns": {}}}, Code.DATA_COLUMNS),
]


@pytest.mark.parametrize(("sections", "code"), OBJECTIONS)
def test_every_reason_to_refuse_is_listed_and_none_can_be_approved(consortium, sections, code):
    consortium.change("north", **sections)
    folder = consortium.publish()
    found = reviewed(consortium, folder)
    assert code in codes(found)
    assert code.label in render(found)
    with pytest.raises(WardroundError) as refused:
        consortium.approve("north", folder)
    assert refused.value.code in codes(found)
    # Nothing is left behind that could be taken for an approval.
    assert not list(consortium.state("north").glob("studies/*"))
    assert not (consortium.state("north") / "roster.json").exists()


def _rogue(consortium):
    return consortium.publish(name="rogue", signer=SiteKey.generate(SystemEntropy()))


def _no_offer(consortium):
    folder = consortium.publish(name="bare")
    (folder / "offer.json").unlink()
    return folder


def _offer_for_another(consortium, bundle_of):
    other = consortium.publish(bundle_of(training={"rounds": 3}), name="other")
    folder = consortium.publish(name="mixed")
    shutil.copy(other / "offer.json", folder / "offer.json")
    return folder


def _without_us(consortium, bundle_of):
    sites = [{"id": name} for name in ("east", "south", "west")]
    return consortium.publish(bundle_of(sites=sites), name="others")


def _other_key(consortium):
    return consortium.publish(name="swap", north=SiteKey.generate(SystemEntropy()).public)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (_rogue, Code.ROSTER_SIGNATURE),
        (_no_offer, Code.NOT_PUBLISHED),
        (_offer_for_another, Code.OFFER_SIGNATURE),
        (_without_us, Code.APPROVAL_SITE),
        (_other_key, Code.SITE_MISMATCH),
    ],
)
def test_only_what_the_pinned_coordinator_offers_to_this_hospital_can_be_approved(
    consortium, bundle_of, make, code
):
    wants_bundles = make.__code__.co_argcount == 2
    folder = make(consortium, bundle_of) if wants_bundles else make(consortium)
    assert code in codes(reviewed(consortium, folder))
    with pytest.raises(WardroundError):
        consortium.approve("north", folder)


def test_an_older_roster_is_not_accepted_after_a_newer_one(consortium, bundle_of):
    other = bundle_of(training={"rounds": 3})
    consortium.approve("north", consortium.publish(other, name="newer", version=5))
    found = reviewed(consortium, consortium.publish(name="older", version=4))
    assert codes(found) == [Code.ROSTER_ROLLBACK]
    # Control: the same study under the same newest roster.
    assert codes(reviewed(consortium, consortium.publish(name="now", version=5))) == []


def test_a_cap_that_other_studies_used_up_is_an_objection(consortium, bundle_of):
    from client.folders import HospitalFolder
    from client.hospital import open_population
    from client.privacy.ledger import Charge, RoundId
    from common.accountant import DpEvent

    config = consortium.config("north")
    ledger = open_population(config, HospitalFolder(consortium.state("north")), SystemEntropy())
    split = ledger.split(consortium.bundle.study.evaluation.held_out).identity
    ledger.reserve_round(
        RoundId(bytes(32), "", 1), [Charge("train", "train", (DpEvent(0.5, 1.0, 1),))], split
    )
    spent = ledger.spent()
    ledger.close()
    found = reviewed(consortium)
    assert codes(found) == [Code.BUDGET_EXCEEDED]
    assert found.forecast.before == pytest.approx(spent.epsilon, abs=1e-6)
    assert found.forecast.after > 12 > found.forecast.before
    assert found.forecast.left == 0


def test_another_division_of_the_patients_adds_both_sides_up(consortium):
    bundle = consortium.bundle

    def after(rows, split):
        made = forecast_study(bundle, rows, releases=1, split=split, cap=100.0, delta=1e-5)
        return made.after

    charged = _rows(bundle, "a")
    assert after(charged, "a") < after(charged, "b")


def _rows(bundle, split):
    from client.privacy.ledger import LedgerRow

    body = {
        "study": "00" * 32,
        "round": 1,
        "attempt": 1,
        "split": split,
        "part": "held_out",
        "work": "evaluate",
        "events": [[2.0, 1.0, 1]],
    }
    return [LedgerRow(2, "charge", 0.0, body)]


def test_a_study_without_privacy_says_so(consortium, bundle_of):
    none = dict.fromkeys(("epsilon", "delta", "clip_norm", "statistics_epsilon"))
    folder = consortium.publish(bundle_of(privacy={"mode": "none", **none}), name="plain")
    found = reviewed(consortium, folder)
    assert codes(found) == [Code.APPROVAL_NO_PRIVACY]
    assert found.forecast is None
    assert "no differential privacy" in render(found)
    consortium.change("north", ceilings={"require_privacy": False})
    assert consortium.approve("north", folder)


# ---------------------------------------------------------------------------- small cells


def records(*counts):
    made = []
    for label, count in enumerate(counts):
        made += [
            Record(f"p{label}-{number}", "", f"label-{label}", None, "f", number)
            for number in range(count)
        ]
    return made


def labels(*counts):
    return [f"label-{label}" for label in range(len(counts))]


def test_counts_of_few_patients_are_not_shown():
    shown = shown_counts(records(3, 4, 50), labels(3, 4, 50))
    assert shown == {
        "all": "57",
        "label-0": "fewer than 10",
        "label-1": "fewer than 10",
        "label-2": "50",
    }


def test_one_small_count_cannot_be_worked_out_from_the_others():
    shown = shown_counts(records(3, 40, 50), labels(3, 40, 50))
    assert shown["label-2"] == "50"
    assert shown["label-0"] == shown["label-1"] == "not shown"


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6))
def test_no_small_count_is_shown_or_follows_by_subtraction(counts):
    shown = shown_counts(records(*counts), labels(*counts))
    total = shown.pop("all")
    numbers = [int(text) for text in shown.values() if text.isdigit()]
    assert all(number >= SMALL for number in numbers)
    hidden = len(shown) - len(numbers)
    assert hidden != 1 or not total.isdigit()
    if sum(counts) >= SMALL:
        assert int(total) == sum(counts)
    # Control: what is not small is shown where nothing else must be hidden for it.
    if min(counts) >= SMALL:
        assert numbers == counts


def test_a_hospital_with_few_patients_is_told_so_without_the_number(consortium):
    path = consortium.root / "north" / "labs.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows[:6])
    found = reviewed(consortium)
    assert Code.SITE_TOO_SMALL in codes(found)
    assert found.patients["all"] == "fewer than 10"
    assert "fewer than 10" in render(found)


# ---------------------------------------------------------------------------- the approval


def test_an_approval_says_who_when_what_and_pins_the_roster(consortium):
    assert consortium.approve("north", by="Dr. Grey")
    folder = consortium.state("north") / "studies" / consortium.bundle.digest.hex()[:16]
    approval = Approval.load(folder / "approval.json")
    assert (approval.by, approval.site, approval.epsilon) == ("Dr. Grey", "north", 8.0)
    approval.verified(consortium.keys["north"].public, "north")
    assert (consortium.state("north") / "roster.json").is_file()
    assert {path.name for path in (folder / "bundle").iterdir()} == {
        "study.yaml",
        "bundle.json",
        "initial.safetensors",
        "roster.json",
        "offer.json",
    }


def test_approving_again_changes_nothing(consortium):
    folder = consortium.publish()
    assert consortium.approve("north", folder, by="Dr. Grey")
    path = next(consortium.state("north").glob("studies/*/approval.json"))
    before = path.read_bytes()
    assert not consortium.approve("north", folder, by="Dr. Who")
    assert path.read_bytes() == before
    assert reviewed(consortium, folder).approved_by == "Dr. Grey"


def test_after_an_update_the_new_code_is_approved_anew(consortium, monkeypatch):
    consortium.approve("north", by="Dr. Grey")
    monkeypatch.setattr("client.review.code_digest", lambda packages: b"\7" * 32)
    assert consortium.approve("north", consortium.root / "bundle", by="Dr. Who")
    path = next(consortium.state("north").glob("studies/*/approval.json"))
    assert Approval.load(path).code == b"\7" * 32


def test_what_is_approved_is_the_copy_that_was_reviewed(consortium):
    """Changing the folder afterwards changes nothing; nor is anything else of it taken along."""
    folder = consortium.publish()
    (folder / "setup.py").write_text("raise SystemExit('a stranger')")
    consortium.approve("north", folder)
    shutil.rmtree(folder)
    kept = next(consortium.state("north").glob("studies/*/bundle"))
    assert not (kept / "setup.py").exists()
    host = consortium.host("north")
    assert host.ask(consortium.bundle.digest, (), hello=True).payloads


def test_a_study_that_began_keeps_its_hospitals_keys(consortium):
    consortium.approve("north")
    host = consortium.host("north")
    host.ask(consortium.bundle.digest, (), hello=True)
    journal = next(consortium.state("north").glob("studies/*/journal"))
    (journal / "record").write_bytes(b"begun")
    consortium.close()
    newer = consortium.publish(
        name="newer", version=2, east=SiteKey.generate(SystemEntropy()).public
    )
    with pytest.raises(WardroundError) as refused:
        consortium.approve("north", newer)
    assert refused.value.code is Code.APPROVAL_SITE
    # Control: a newer roster that leaves the study's keys alone is followed.
    assert consortium.approve("north", consortium.publish(name="same", version=3))


def test_a_damaged_bundle_is_not_reviewed(consortium):
    folder = consortium.publish()
    (folder / "initial.safetensors").write_bytes(b"no")
    with pytest.raises(WardroundError) as refused:
        reviewed(consortium, folder)
    assert refused.value.code is Code.BUNDLE_DAMAGED


def test_a_hospital_that_is_not_enrolled_cannot_review(consortium):
    (consortium.state("north") / "coordinator.json").unlink()
    with pytest.raises(WardroundError) as refused:
        reviewed(consortium)
    assert refused.value.code is Code.NOT_ENROLLED


def test_a_backbone_that_is_missing_or_another_is_an_objection(
    consortium, tiny_bert, tmp_path, write_study
):
    from client.build import build_model
    from common.bundle import resolve
    from common.config import load
    from common.study import Site, Study

    copy = tmp_path / "bert"
    shutil.copytree(tiny_bert, copy)
    (tmp_path / "text").mkdir()
    study = load(
        write_study(
            tmp_path / "text",
            copy,
            {"privacy": {"delta": 1e-5}},
            hospitals=("north",),
        ),
        Study,
    ).with_sites([Site(id=name) for name in ("east", "north", "south")])
    built = build_model(study)
    bundle = resolve(study, built.initial, built.backbone_digest, built.config)
    folder = consortium.publish(bundle, name="text-bundle")
    notes = str(tmp_path / "text" / "notes.csv")
    consortium.change("north", data={"files": [notes], "columns": {}})
    assert codes(reviewed(consortium, folder)) == []
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"note": "changed"}))
    assert codes(reviewed(consortium, folder)) == [Code.BACKBONE_DIFFERS]
    shutil.rmtree(copy)
    assert codes(reviewed(consortium, folder)) == [Code.MODEL_FOLDER]


def test_a_knowledge_graph_that_is_missing_or_another_is_an_objection(
    consortium, tmp_path, monkeypatch
):
    from client.build import build_model
    from client.data.synthetic_visits import write_visits
    from client.knowledge import shelf
    from common.bundle import resolve
    from common.config import load
    from common.study import Site, Study

    monkeypatch.setattr(shelf, "_SHELF", {})
    graphs = tmp_path / "graphs" / "data"
    graphs.mkdir(parents=True)
    write_visits(graphs)
    configs = Path(__file__).parents[3] / "configs"
    study = load(configs / "medication.yaml", Study).with_sites(
        [Site(id=name) for name in ("east", "north", "south")]
    )
    privacy = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
    study = Study.model_validate(study.model_dump(mode="json") | {"privacy": privacy})
    shelf.read_knowledge(study.task, graphs.parent)
    built = build_model(study)
    bundle = resolve(study, built.initial, built.backbone_digest, built.config)
    folder = consortium.publish(bundle, name="drugs-bundle")
    files = {"files": [str(graphs / "synthetic-visits.csv")], "columns": {}}

    def objected(**changed):
        monkeypatch.setattr(shelf, "_SHELF", {})
        consortium.change("north", data=files, **changed)
        return codes(reviewed(consortium, folder))

    assert objected() == [Code.GRAPH_ABSENT]
    assert objected(knowledge=str(graphs.parent)) == []
    with (graphs / "synthetic-knowledge.tsv").open("a") as file:
        file.write("atc\tN02BE01\tinteracts\tatc\tA10BA02\tsomebody\tCC0-1.0\t\t\n")
    assert objected(knowledge=str(graphs.parent)) == [Code.GRAPH_DIFFERS]
