"""What the factory of a hospital decides itself: keys on disk, and what a round is charged."""

from __future__ import annotations

import pytest

from client.privacy.ledger import Charge
from client.round.effects import Work
from client.site import charges_of, site_key
from common.accountant import DpEvent
from common.bundle import Bundle
from common.errors import Code, StorageError
from common.study import Study
from common.world import SystemEntropy

TRAIN = Charge("train", "train", (DpEvent(1.3, 0.1, 7),))
EVALUATE = Charge("evaluate", "held_out", (DpEvent(9.0, 1.0, 1),))
STATISTICS = Charge("statistics", "train", (DpEvent(5.0, 1.0, 1),))


@pytest.fixture
def bundle(study_of):
    study = study_of("package:nothing/model").model_dump()
    study["training"] |= {"local_steps": 7, "sampling_rate": 0.1}
    study["privacy"] = {"mode": "local", "epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}
    return Bundle(Study.model_validate(study), {}, bytes(32), "{}", 1.3, 9.0, 5.0)


@pytest.mark.parametrize(
    ("does", "charges"),
    [
        ({"trains"}, (TRAIN,)),
        ({"trains", "measures"}, (TRAIN, EVALUATE)),
        ({"measures"}, (EVALUATE,)),
        ({"counts"}, (STATISTICS,)),
        ({"counts", "trains", "measures"}, (STATISTICS, TRAIN, EVALUATE)),
        (set(), ()),
    ],
)
def test_what_a_round_is_charged_is_what_it_does(bundle, does, charges):
    asked = {name: name in does for name in ("trains", "measures", "counts")}
    assert charges_of(bundle, Work(1, 0, {}, **asked)) == charges


def test_a_hospital_keeps_its_identity_in_a_folder_of_its_own(tmp_path):
    folder = tmp_path / "a" / "b"
    key = site_key(folder, SystemEntropy())
    assert site_key(folder, SystemEntropy()).public == key.public
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_a_storage_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as refused:
        site_key(tmp_path / "file" / "site", SystemEntropy())
    assert refused.value.code is Code.JOURNAL_WRITE
