"""The roster: one list, one signature, no second name for a key."""

from __future__ import annotations

import json

import pytest

from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError
from common.roster import Roster, SignedRoster

KEYS = {name: SiteKey.from_seed(bytes([i]) * 32) for i, name in enumerate(("a", "b", "c"), 1)}
CONSORTIUM = SiteKey.from_seed(b"\x09" * 32)
MEMBERS = {name: key.public for name, key in KEYS.items()}


def refused(code: Code, action) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        action()
    assert caught.value.code is code
    return caught.value


def test_a_signed_roster_comes_back_from_disk_as_it_was(tmp_path) -> None:
    signed = Roster.of(MEMBERS, version=4).signed(CONSORTIUM)
    signed.save(tmp_path / "roster.json")
    loaded = SignedRoster.load(tmp_path / "roster.json")
    assert loaded == signed
    assert loaded.verified(CONSORTIUM.public) == Roster.of(MEMBERS, version=4)
    assert [path.name for path in tmp_path.iterdir()] == ["roster.json"]


def test_the_digest_depends_on_version_names_and_keys_and_not_on_the_order_given() -> None:
    base = Roster.of(MEMBERS)
    swapped = {"a": MEMBERS["b"], "b": MEMBERS["a"], "c": MEMBERS["c"]}
    others = [Roster.of(MEMBERS, 2), Roster.of(swapped), Roster.of({"a": MEMBERS["a"]})]
    assert len({roster.digest() for roster in [base, *others]}) == 4
    assert Roster.of(dict(reversed(MEMBERS.items()))).digest() == base.digest()


def test_one_key_under_two_names_is_refused() -> None:
    error = refused(Code.ROSTER_INVALID, lambda: Roster.of({**MEMBERS, "d": MEMBERS["a"]}))
    assert "a and d have the same key" in error.message


@pytest.mark.parametrize(
    ("site", "key"),
    [
        ("A!", MEMBERS["a"]),
        ("", MEMBERS["a"]),
        ("a", b"short"),
        ("a", b"\x01" + bytes(31)),
        ("a", bytes(32)),
        ("a", b"\xff" * 32),
    ],
)
def test_an_unusable_name_or_key_is_refused(site: str, key: bytes) -> None:
    refused(Code.ROSTER_INVALID, lambda: Roster.of({site: key}))


def test_an_empty_or_unnumbered_roster_is_refused() -> None:
    refused(Code.ROSTER_INVALID, lambda: Roster.of({}))
    refused(Code.ROSTER_INVALID, lambda: Roster.of(MEMBERS, 0))


def test_members_out_of_order_or_twice_cannot_be_made() -> None:
    a, b = sorted(Roster.of(MEMBERS).members)[:2]
    refused(Code.ROSTER_INVALID, lambda: Roster(1, (b, a)))
    refused(Code.ROSTER_INVALID, lambda: Roster(1, (a, a)))


def test_every_altered_byte_of_a_signed_roster_is_refused() -> None:
    good = Roster.of(MEMBERS).signed(CONSORTIUM)
    for index in range(64):
        signature = bytearray(good.signature)
        signature[index] ^= 1
        bad = SignedRoster(good.roster, good.signer, bytes(signature))
        refused(Code.ROSTER_SIGNATURE, lambda bad=bad: bad.verified(CONSORTIUM.public))
    added = Roster.of({**MEMBERS, "d": SiteKey.from_seed(b"\x08" * 32).public})
    forged = SignedRoster(added, good.signer, good.signature)
    refused(Code.ROSTER_SIGNATURE, lambda: forged.verified(CONSORTIUM.public))


def test_a_roster_signed_by_anybody_else_is_refused() -> None:
    other = Roster.of(MEMBERS).signed(KEYS["a"])
    refused(Code.ROSTER_SIGNATURE, lambda: other.verified(CONSORTIUM.public))
    posing = SignedRoster(other.roster, CONSORTIUM.public, other.signature)
    refused(Code.ROSTER_SIGNATURE, lambda: posing.verified(CONSORTIUM.public))
    assert other.verified(KEYS["a"].public)  # control: under its own key it holds


def test_an_older_or_a_second_roster_of_one_version_is_refused() -> None:
    old, new = Roster.of(MEMBERS, 1), Roster.of(MEMBERS, 2)
    fewer = Roster.of({"a": MEMBERS["a"]}, 2)
    key = CONSORTIUM.public
    refused(Code.ROSTER_ROLLBACK, lambda: old.signed(CONSORTIUM).verified(key, in_use=new))
    refused(Code.ROSTER_ROLLBACK, lambda: fewer.signed(CONSORTIUM).verified(key, in_use=new))
    assert new.signed(CONSORTIUM).verified(key, in_use=old) == new
    assert new.signed(CONSORTIUM).verified(key, in_use=new) == new


def test_a_damaged_file_is_named_by_line(tmp_path) -> None:
    path = tmp_path / "roster.json"
    Roster.of(MEMBERS).signed(CONSORTIUM).save(path)
    text = path.read_text()
    for damaged in (
        text.replace(MEMBERS["b"].hex(), "00"),
        text.replace('"version": 1', '"version": 0'),
        text.replace('"version": 1', '"version": 1, "version": 2'),
        text.replace('"signer"', '"singer"'),
        text[:-20],
        "",
    ):
        path.write_text(damaged)
        with pytest.raises(ConfigError, match=r"roster\.json:\d+:\d+: "):
            SignedRoster.load(path)
    sites = json.loads(text)["sites"]
    path.write_text(json.dumps({**json.loads(text), "sites": [*sites, sites[0]]}))
    refused(Code.ROSTER_INVALID, lambda: SignedRoster.load(path))


def test_a_roster_that_cannot_be_written_leaves_nothing_behind(tmp_path) -> None:
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(StorageError) as caught:
        Roster.of(MEMBERS).signed(CONSORTIUM).save(target)
    assert caught.value.code is Code.ROSTER_WRITE
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_roster_knows_its_sites() -> None:
    roster = Roster.of(MEMBERS)
    assert roster.sites == ("a", "b", "c")
    assert "a" in roster
    assert "d" not in roster
    assert len(roster) == 3
    assert roster.keys() == MEMBERS
