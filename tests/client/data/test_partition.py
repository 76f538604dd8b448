import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.partition import manifest, partition, site_slug
from client.data.records import Record
from client.privacy.ledger import HeldOutSplit
from common.errors import Code, DataError
from common.study import Split

LABELS = ("a", "b", "c")
SPLITS = (
    {"by": "iid"},
    {"by": "dirichlet", "alpha": 0.5},
    {"by": "dirichlet", "alpha": 100.0},
    *({"by": "quantity", "skew": s} for s in ("uniform", "linear", "square", "exponential")),
    {"by": "pathological", "classes_per_site": 2},
)


def _records(patients, notes=2, site="Site {}"):
    found = []
    for index in range(patients):
        for note in range(1 + index % notes):
            label = LABELS[(index + note // 2) % 3]
            where = site.format(index % 4)
            found.append(Record(f"p{index}", "x", label, where, "f.csv", len(found) + 2))
    return found


@settings(max_examples=60, deadline=None)
@given(
    settings_=st.sampled_from(SPLITS),
    sites=st.integers(3, 6),
    patients=st.integers(90, 160),
    seed=st.integers(0, 2**63 - 1),
    fraction=st.floats(0.05, 0.95),
)
def test_no_patient_is_at_two_sites_or_on_both_sides(settings_, sites, patients, seed, fraction):
    records = _records(patients, notes=3)
    split = Split.model_validate({**settings_, "sites": sites})
    done = partition(records, split, labels=LABELS, seed=seed, floor=1)
    assert done == partition(records, split, labels=LABELS, seed=seed, floor=1)
    assert len(done.records) == sites
    homes: dict[str, set[str]] = {}
    for site, positions in done.records.items():
        assert len(done.patients[site]) >= 1
        for at in positions:
            homes.setdefault(records[at].patient, set()).add(site)
    assert all(len(found) == 1 for found in homes.values())
    assert sorted(at for held in done.records.values() for at in held) == list(range(len(records)))
    held_out = HeldOutSplit(hashlib.sha256(b"k").digest(), fraction)
    sides = {(r.patient, held_out.holds_out(r.patient)) for r in records}
    assert len(sides) == patients


def test_another_seed_gives_another_split():
    records = _records(120)
    split = Split.model_validate({"by": "iid", "sites": 4})
    one, two = (partition(records, split, labels=LABELS, seed=s) for s in (0, 1))
    assert one.records != two.records


def test_iid_is_even_and_skews_follow_their_law():
    records = _records(300, notes=1)

    def sizes(**fields):
        split = Split.model_validate({"sites": 4, **fields})
        done = partition(records, split, labels=LABELS, seed=3, floor=0)
        return [len(found) for found in done.patients.values()]

    assert sizes(by="iid") == [75, 75, 75, 75]
    assert sizes(by="quantity", skew="linear") == [30, 60, 90, 120]
    assert sizes(by="quantity", skew="square") == [10, 40, 90, 160]
    exponential = sizes(by="quantity", skew="exponential")
    assert sum(exponential) == 300
    assert exponential[3] / exponential[2] == pytest.approx(2.718, rel=0.05)


def test_a_steep_skew_leaves_every_site_its_floor():
    split = Split.model_validate({"by": "quantity", "skew": "exponential", "sites": 10})
    done = partition(_records(400), split, labels=LABELS, seed=0)
    sizes = [len(found) for found in done.patients.values()]
    assert min(sizes) >= 10
    assert max(sizes) > 150


def test_a_small_alpha_skews_labels_and_a_large_one_does_not():
    records = _records(600, notes=1)

    def spread(alpha):
        split = Split.model_validate({"by": "dirichlet", "alpha": alpha, "sites": 4})
        done = partition(records, split, labels=LABELS, seed=0)
        shares = []
        for positions in done.records.values():
            counts = Counter(records[at].label for at in positions)
            shares.append(max(counts.values()) / len(positions))
        return sum(shares) / len(shares)

    assert spread(1000.0) < 0.42
    assert spread(0.3) > 0.55


def test_pathological_sites_see_exactly_their_classes_and_warn():
    records = _records(300, notes=1)
    split = Split.model_validate({"by": "pathological", "classes_per_site": 1, "sites": 3})
    done = partition(records, split, labels=LABELS, seed=0)
    for positions in done.records.values():
        assert len({records[at].label for at in positions}) == 1
    assert len(done.warnings) == 3
    assert "no record of 2 label(s)" in done.warnings[0]


def test_by_column_follows_the_data_and_makes_ids():
    records = _records(120, site="Klinik Süd {}")
    split = Split.model_validate({"by": "column", "column": "hospital"})
    done = partition(records, split, labels=LABELS, seed=0)
    assert list(done.records) == [f"klinik-sud-{i}" for i in range(4)]
    assert all(records[at].site == "Klinik Süd 2" for at in done.records["klinik-sud-2"])


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("St. Mary's (North)", "st-mary-s-north"),
        ("  ÄÖÜ--9 ", "aou-9"),
        ("X" * 90, "x" * 63),
        ("a" * 62 + " b", "a" * 62),
    ],
)
def test_a_hospitals_name_becomes_a_site_id(name, slug):
    assert site_slug(name) == slug


@pytest.mark.parametrize("name", ["", "---", "病院"])
def test_a_name_without_letters_or_digits_cannot(name):
    with pytest.raises(ValueError, match="letter"):
        site_slug(name)


def _refusal(records, fields, **arguments):
    with pytest.raises(DataError) as caught:
        partition(records, Split.model_validate(fields), labels=LABELS, seed=0, **arguments)
    return caught.value


BY_COLUMN = {"by": "column", "column": "hospital"}


def test_what_cannot_be_divided_is_refused_in_bounded_time():
    records = _records(60, notes=1)
    assert _refusal(records, {"by": "iid", "sites": 7}).code is Code.SPLIT_IMPOSSIBLE
    tight = {"by": "dirichlet", "alpha": 0.01, "sites": 6}
    assert _refusal(records, tight).code is Code.SPLIT_IMPOSSIBLE
    many = {"by": "pathological", "classes_per_site": 4, "sites": 3}
    assert _refusal(records, many).code is Code.SPLIT_IMPOSSIBLE


def test_a_site_below_the_floor_is_refused_by_name_and_numbers():
    error = _refusal(_records(38), BY_COLUMN)
    assert error.code is Code.SITE_TOO_SMALL
    assert "site-2 has 9 patients; the floor is 10" in str(error)


def test_a_patient_at_two_hospitals_is_refused():
    records = [*_records(60), Record("p1", "x", "a", "Site 3", "g.csv", 7)]
    error = _refusal(records, BY_COLUMN)
    assert error.code is Code.DATA_PATIENT_TWICE
    assert "g.csv:7" in str(error)
    assert "p1" not in str(error)


def test_site_names_that_fall_together_or_differ_from_the_study_are_refused():
    twins = [Record(f"q{i}", "x", "a", "SITE-1", "g.csv", i) for i in range(20)]
    assert _refusal([*_records(60), *twins], BY_COLUMN).code is Code.SITE_NAME
    nameless = [Record("q", "x", "a", "!!", "g.csv", 1)]
    assert _refusal([*_records(60), *nameless], BY_COLUMN).code is Code.SITE_NAME
    named = ("site-0", "site-1", "site-2", "elsewhere")
    assert _refusal(_records(60), BY_COLUMN, sites=named).code is Code.SITE_NAME


def test_the_studys_sites_name_the_parts():
    split = Split.model_validate({"by": "iid", "sites": 3})
    done = partition(_records(60), split, labels=LABELS, seed=0, sites=("x", "y", "z"))
    assert list(done.records) == ["x", "y", "z"]


def test_the_manifest_tells_inputs_settings_and_counts(tmp_path):
    path = tmp_path / "f.csv"
    path.write_bytes(b"abc")
    records = _records(60, notes=2)
    split = Split.model_validate({"by": "iid", "sites": 3})
    done = partition(records, split, labels=LABELS, seed=5)
    told = manifest(records, done, split, seed=5, files=[path])
    assert told == json.loads(json.dumps(told))
    assert told["inputs"][0]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert told["split"] == {"by": "iid", "sites": 3}
    assert told["seed"] == 5
    assert sum(site["rows"] for site in told["sites"].values()) == told["rows"] == len(records)
    assert sum(site["patients"] for site in told["sites"].values()) == 60
    for site in told["sites"].values():
        assert sum(site["rows_by_label"].values()) == site["rows"]
