"""What the coordinator puts into a bundle folder, and what a hospital makes of it."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from common.bundle import Bundle
from common.crypto.identity import SiteKey
from common.errors import Code, WardroundError
from common.offer import Offer, open_offer
from common.roster import Roster
from common.study import Study
from server import enrol

SITES = ("east", "north", "south")


@contextmanager
def refused(code: Code):
    with pytest.raises(WardroundError) as caught:
        yield caught
    assert caught.value.code is code


def bundle(name: str = "trial", sites=SITES) -> Bundle:
    study = {
        "format": "wardround-study/1",
        "name": name,
        "task": {"kind": "diagnosis", "labels": ("a", "b")},
        "model": {"backbone": "hub/model", "tuning": "head"},
        "privacy": {"mode": "none"},
        "sites": tuple({"id": site} for site in sites),
    }
    weights = {"head": np.zeros((2, 3), np.float32)}
    return Bundle(Study.model_validate(study), weights, bytes(32), "{}", None, None)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "trial-bundle"
    bundle().save(path)
    return path


def test_a_published_study_opens_under_the_pinned_key_with_every_hospitals_key(
    lake, folder
) -> None:
    lake.enrol(*SITES, "west")
    done = enrol.publish(lake.state, folder)
    public = enrol.coordinator_key(lake.state).public
    signed = open_offer(folder, public=public, study=bundle().digest)
    assert (done.study, done.roster, done.version) == (
        bundle().digest,
        signed.roster.digest(),
        4,
    )
    assert signed.roster.sites == (*SITES, "west")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    enrol.publish(lake.state, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_study_with_a_hospital_that_is_not_admitted_is_not_published_and_names_it(
    lake, folder
) -> None:
    with refused(Code.SITE_NOT_ADMITTED) as caught:
        enrol.publish(lake.state, folder)
    assert "east, north, south" in caught.value.message
    lake.enrol("east", "north")
    lake.invite("south")
    with refused(Code.SITE_NOT_ADMITTED) as caught:
        enrol.publish(lake.state, folder)
    assert caught.value.message.endswith("not admitted: south.")
    lake.enrol("south")
    enrol.publish(lake.state, folder)
    enrol.revoke(lake.state, "east")
    with refused(Code.SITE_NOT_ADMITTED):
        enrol.publish(lake.state, folder)


def test_a_changed_bundle_is_not_signed(lake, folder) -> None:
    lake.enrol(*SITES)
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(text.replace('"trial"', '"other"'))
    with refused(Code.BUNDLE_DAMAGED):
        enrol.publish(lake.state, folder)
    assert not (folder / "offer.json").exists()


def test_an_offer_of_another_key_study_or_roster_is_refused(lake, found, folder) -> None:
    lake.enrol(*SITES)
    enrol.publish(lake.state, folder)
    public, study = enrol.coordinator_key(lake.state).public, bundle().digest
    open_offer(folder, public=public, study=study)  # control
    with refused(Code.OFFER_SIGNATURE):
        open_offer(folder, public=public, study=bundle("other").digest)
    with refused(Code.ROSTER_SIGNATURE):
        open_offer(folder, public=SiteKey.from_seed(b"x" * 32).public, study=study)
    # The coordinator's own newer roster, which this study was not offered with.
    lake.enrol("west")
    lake.signed_roster().save(folder / "roster.json")
    with refused(Code.OFFER_SIGNATURE):
        open_offer(folder, public=public, study=study)


def test_every_altered_field_of_an_offer_is_refused(lake) -> None:
    key, study, roster = enrol.coordinator_key(lake.state), b"s" * 32, b"r" * 32
    offer = Offer.sign(key, study, roster)
    assert offer.verified(key.public, study=study, roster=roster) == offer
    other = SiteKey.from_seed(b"y" * 32)
    for change in (
        {"study": (b"t" * 32).hex()},
        {"roster": study.hex()},
        {"study": roster.hex(), "roster": study.hex()},
        {"signature": "00" * 64},
        {"coordinator": other.public.hex()},
    ):
        changed = offer.model_copy(update=change)
        with refused(Code.OFFER_SIGNATURE):
            changed.verified(key.public, study=changed.study_digest, roster=changed.roster_digest)
    with refused(Code.OFFER_SIGNATURE):
        Offer.sign(other, study, roster).verified(key.public, study=study, roster=roster)


def test_a_hospital_refuses_a_study_under_an_older_roster_than_it_has_seen(lake, folder) -> None:
    lake.enrol(*SITES)
    enrol.publish(lake.state, folder)
    public = enrol.coordinator_key(lake.state).public
    members = lake.signed_roster().roster.keys()
    newer = Roster.of(members, version=4)
    with refused(Code.ROSTER_ROLLBACK):
        open_offer(folder, public=public, study=bundle().digest, in_use=newer)
    same = Roster.of(members, version=3)
    open_offer(folder, public=public, study=bundle().digest, in_use=same)


def test_a_study_keeps_the_keys_of_its_roster_after_a_rotation(lake, folder) -> None:
    import client.enrol

    lake.enrol(*SITES)
    enrol.publish(lake.state, folder)
    lake.now += 1
    lake.admit(lake.rotate(lake.invite("east")))
    public = enrol.coordinator_key(lake.state).public
    under_way = open_offer(folder, public=public, study=bundle().digest).roster.keys()["east"]
    assert under_way != lake.signed_roster().roster.keys()["east"]
    assert client.enrol.key_of(lake.hospital("east"), under_way).public == under_way
