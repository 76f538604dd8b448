"""From an invite to the roster: who is admitted, and everybody who is not."""

from __future__ import annotations

import base64
import os
import struct
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import client.enrol
from common.crypto import labels
from common.crypto.identity import SiteKey
from common.errors import Code, WardroundError
from common.invite import Invite, Join, check_transport, new_transport, transport_public
from common.roster import SignedRoster
from common.world import SystemEntropy
from server import enrol
from server.enrol import _settle

ENTROPY = SystemEntropy()


@contextmanager
def refused(code: Code):
    with pytest.raises(WardroundError) as caught:
        yield caught
    assert caught.value.code is code
    # No secret and no payload in what people read.
    assert "PRIVATE" not in str(caught.value)


def test_an_invited_hospital_whose_words_agree_is_admitted_and_in_a_signed_roster(lake) -> None:
    join = lake.join(lake.invite())
    site = lake.admit(join)
    assert (site.site, site.version, site.since, site.revoked) == ("st-mary", 1, 1, False)
    assert site.identity == client.enrol.key_of(lake.hospital(), site.identity).public
    assert site.transport.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert enrol.admitted(lake.state) == (site,)
    key = enrol.coordinator_key(lake.state).public
    assert lake.signed_roster().verified(key).keys() == {"st-mary": site.identity}
    pin = client.enrol.pinned(lake.hospital())
    assert (pin.url, pin.coordinator, pin.site) == ("localhost:8443", key, "st-mary")
    assert pin.ca.read_text() == (lake.state / "tls/ca.crt").read_text()


def test_every_admission_numbers_a_new_roster(lake) -> None:
    lake.enrol("east", "north", "south")
    roster = lake.signed_roster().roster
    assert (roster.version, roster.sites) == (3, ("east", "north", "south"))


def test_the_same_invite_again_gives_the_same_keys_and_the_same_words(lake) -> None:
    invite = lake.invite()
    first, second = lake.join(invite), lake.join(invite)
    assert (first.identity, first.transport, first.words) == (
        second.identity,
        second.transport,
        second.words,
    )
    assert lake.join(invite, lake.root / "elsewhere").words != first.words  # control


def test_no_secret_of_either_side_is_in_a_file_that_travels(lake) -> None:
    invite = lake.invite()
    path = lake.root / "st-mary.join"
    lake.join(invite).save(path)
    sent = path.read_text()
    assert invite.token not in sent
    assert (lake.hospital() / "identity.key").read_bytes().hex() not in sent
    invite.save(lake.root / "st-mary.invite")
    given = (lake.root / "st-mary.invite").read_text()
    assert invite.token in given  # control: it is looked for in the form it would have
    assert (lake.state / "identity.key").read_bytes().hex() not in given
    assert invite.token not in repr(invite)


# ------------------------------------------------------------------------------- invite


FORGED = [
    ("site", "lakeside"),
    ("name", "St Mary"),
    ("consortium", "Other"),
    ("url", "evil.example:8443"),
    ("version", 2),
    ("expires", 2**39),
    ("issued", 1),
    ("token", "00" * 32),
]


@pytest.mark.parametrize(("field", "value"), FORGED)
def test_an_invite_with_any_word_changed_is_refused_before_a_file_is_written(
    lake, field: str, value: object
) -> None:
    forged = lake.invite().model_copy(update={field: value})
    with refused(Code.INVITE_SIGNATURE):
        lake.join(forged)
    assert not lake.hospital().exists()


def test_an_invite_with_another_ca_or_another_key_is_refused(lake, found) -> None:
    good, other = lake.invite(), found("other").invite()
    with refused(Code.INVITE_SIGNATURE):
        lake.join(good.model_copy(update={"ca": other.ca}))
    with refused(Code.INVITE_SIGNATURE):
        lake.join(good.model_copy(update={"coordinator": other.coordinator}))
    with refused(Code.INVITE_SIGNATURE):  # a point of small order verifies everything
        lake.join(good.model_copy(update={"coordinator": "01" + "00" * 31}))


def test_an_invite_whose_certificate_is_none_or_no_ca_is_refused(lake) -> None:
    key = enrol.coordinator_key(lake.state)
    for ca in ("nonsense", (lake.state / "tls/server.crt").read_text()):
        draft = lake.invite().model_copy(update={"ca": ca})
        signed = key.sign(labels.INVITE, draft._told()).hex()
        with refused(Code.ENROL_FILE):
            lake.join(draft.model_copy(update={"signature": signed}))


def test_an_expired_invite_is_refused_by_both_sides(lake) -> None:
    invite = lake.invite(days=1)
    join = lake.join(invite)
    lake.now += 86400 - 1
    enrol.examine(lake.state, join, lake.now)  # control: one second earlier it holds
    lake.now += 1
    with refused(Code.INVITE_EXPIRED):
        lake.join(invite)
    with refused(Code.INVITE_EXPIRED):
        lake.admit(join)


def test_a_second_invite_voids_the_first(lake) -> None:
    first = lake.invite()
    join = lake.join(first)
    second = lake.invite()
    with refused(Code.INVITE_STALE):
        lake.admit(join)
    lake.now += 1
    again = lake.join(second)
    assert again.identity == join.identity
    lake.admit(again)


def test_an_older_invite_cannot_bring_an_older_address_back(lake) -> None:
    old = lake.invite()
    lake.now += 1
    new = lake.invite()
    lake.join(new)
    with refused(Code.INVITE_STALE):
        lake.join(old)


@pytest.mark.parametrize("site", ["coordinator", "", "St-Mary", "a/b", "../x", "x" * 64])
def test_an_id_that_cannot_name_a_site_is_not_invited(lake, site: str) -> None:
    with refused(Code.SITE_TAKEN):
        lake.invite(site, name="A hospital")


def test_two_hospitals_whose_names_suggest_one_id_do_not_become_one(lake) -> None:
    assert enrol.site_id("St. Mary") == enrol.site_id("St Mary") == "st-mary"
    assert enrol.site_id("Klinikum Köln (Süd)") == "klinikum-koln-sud"
    assert enrol.site_id("医院") == ""
    lake.invite("st-mary", name="St. Mary")
    with refused(Code.SITE_TAKEN):
        lake.invite("st-mary", name="St Mary")
    lake.admit(lake.join(lake.invite("st-mary", name="St. Mary")))
    with refused(Code.SITE_TAKEN):
        lake.invite("st-mary", name="St Mary")


@pytest.mark.parametrize(
    "wrong", [{"name": "a\nb"}, {"url": "nowhere"}, {"days": 0}, {"days": 91}, {"name": ""}]
)
def test_an_invite_that_nobody_could_follow_is_not_made(lake, wrong) -> None:
    told = {"name": "A", "site": "a", "url": "h:1", "days": 14, **wrong}
    with refused(Code.CONFIG_INVALID):
        enrol.invite(lake.state, lake.config, **told, now=lake.now, entropy=ENTROPY)
    assert enrol.invited(lake.state) == ()


# -------------------------------------------------------------------------------- pins


def test_another_coordinators_key_than_the_pinned_one_is_refused(lake, found) -> None:
    lake.join(lake.invite())
    other = found("other")
    with refused(Code.COORDINATOR_CHANGED):
        lake.join(other.invite())
    assert client.enrol.pinned(lake.hospital()).coordinator == (
        enrol.coordinator_key(lake.state).public
    )


def test_an_invite_for_another_hospital_is_refused_in_this_ones_folder(lake) -> None:
    lake.join(lake.invite("east"))
    with refused(Code.SITE_MISMATCH):
        lake.join(lake.invite("west"), lake.hospital("east"))


def test_keys_without_the_pin_they_belong_to_are_not_given_to_a_new_coordinator(lake) -> None:
    # Whoever knew the keys first could look for a coordinator's key with words that fit.
    lake.join(lake.invite())
    (lake.hospital() / "coordinator.json").unlink()
    with refused(Code.KEYS_UNPINNED):
        lake.join(lake.invite())


@pytest.mark.parametrize("left", ["identity.key", "transport.key"])
def test_a_single_key_without_its_pin_is_not_used_either(lake, left: str) -> None:
    lake.join(lake.invite())
    for path in lake.hospital().iterdir():
        if path.name != left:
            path.unlink()
    with refused(Code.KEYS_UNPINNED):
        lake.join(lake.invite())


def test_a_crash_after_the_pin_is_mended_by_the_same_command(lake) -> None:
    invite = lake.invite()
    join = lake.join(invite)
    for name in ("transport.key", "identity.key", "vault.key"):
        (lake.hospital() / name).unlink()
    again = lake.join(invite)
    assert again.identity != join.identity
    lake.admit(again)


@pytest.mark.parametrize("name", ["identity.key", "transport.key", "vault.key"])
def test_a_key_that_others_may_read_is_refused_with_its_fix(lake, name: str) -> None:
    lake.join(lake.invite())
    path = lake.hospital() / name
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with refused(Code.KEY_FILE_OPEN) as caught:
        lake.join(lake.invite())
    assert name in caught.value.message
    assert "chmod 600" in caught.value.remedy


@pytest.mark.parametrize("name", ["identity.key", "admin.token", "tls/ca.key", "tls/server.key"])
def test_an_open_key_of_the_coordinator_is_refused_with_its_fix(lake, name: str) -> None:
    path = lake.state / name
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o604)
    with refused(Code.KEY_FILE_OPEN) as caught:
        enrol.initialise(lake.config, lake.state, now=lake.now, entropy=ENTROPY)
    assert name.rpartition("/")[2] in caught.value.message


def under_a_passphrase() -> bytes:
    """An OpenSSH key file of the encrypted kind; nobody gets as far as its content."""

    def field(content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + content

    body = b"openssh-key-v1\0" + field(b"aes256-ctr") + field(b"bcrypt")
    body += field(field(bytes(16)) + struct.pack(">I", 16)) + struct.pack(">I", 1)
    body += field(field(b"ecdsa-sha2-nistp384") + field(b"nistp384") + field(bytes(97)))
    text = base64.encodebytes(body + field(bytes(256)))
    marks = (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"-----END OPENSSH PRIVATE KEY-----\n")
    return marks[0] + text + marks[1]


@pytest.mark.parametrize("kind", ["passphrase", "ed25519", "p256", "pem", "garbage", "empty"])
def test_a_transport_key_of_another_kind_is_refused(lake, kind: str) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    lake.join(lake.invite())
    plain, p384 = s.NoEncryption(), new_transport()
    openssh = (s.Encoding.PEM, s.PrivateFormat.OpenSSH)
    content = {
        "passphrase": under_a_passphrase(),
        "ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(*openssh, plain),
        "p256": ec.generate_private_key(ec.SECP256R1()).private_bytes(*openssh, plain),
        "pem": p384.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, plain),
        "garbage": os.urandom(600),
        "empty": b"",
    }[kind]
    (lake.hospital() / "transport.key").write_bytes(content)
    with refused(Code.KEY_FILE_DAMAGED):
        lake.join(lake.invite())


# ------------------------------------------------------------------------------- admit


def test_a_join_file_works_once(lake) -> None:
    join = lake.join(lake.invite())
    lake.admit(join)
    with refused(Code.JOIN_USED):
        lake.admit(join)
    assert lake.signed_roster().roster.version == 1


def test_a_join_file_that_nobody_invited_is_refused(lake, found) -> None:
    stranger = found("other")
    with refused(Code.JOIN_UNINVITED):
        lake.admit(stranger.join(stranger.invite()))


def altered(join: Join, **changes) -> Join:
    return join.model_copy(update=changes)


def test_keys_exchanged_on_the_way_are_refused_and_the_words_differ(lake) -> None:
    honest = lake.join(lake.invite())
    other_identity = SiteKey.generate(ENTROPY).public.hex()
    other_transport = transport_public(new_transport()).decode()
    for change in ({"identity": other_identity}, {"transport": other_transport}):
        swapped = altered(honest, **change)
        assert swapped.words != honest.words
        with refused(Code.JOIN_PROOF):
            lake.admit(swapped)
    assert enrol.admitted(lake.state) == ()


def test_a_man_in_the_middle_who_has_the_invite_is_heard_on_the_telephone(lake) -> None:
    # He has the token, so his own join file proves itself; only the call tells.
    invite = lake.invite()
    honest = lake.join(invite)
    his = lake.join(invite, lake.root / "his")
    enrol.examine(lake.state, his, lake.now)
    assert his.words != honest.words
    with refused(Code.WORDS_DIFFER):
        lake.admit(his, said=honest.words)
    assert enrol.admitted(lake.state) == ()
    lake.admit(honest, said=honest.words)


def test_a_forged_coordinator_is_heard_on_the_telephone_as_well(lake, found) -> None:
    # He gives the hospital an invite of his own with the real token, and passes its real keys on.
    real, his = lake.invite(), found("his")
    forged = Invite.issue(
        enrol.coordinator_key(his.state),
        consortium="Lake",
        guest=enrol.Guest("st-mary", "St-Mary", 1),
        url="evil.example:8443",
        times=(lake.now, lake.now + 1000),
        ca=real.ca,
        token=bytes.fromhex(real.token),
    )
    heard = lake.join(forged)
    with refused(Code.JOIN_PROOF):
        lake.admit(heard)
    # Even with a proof that held, the words are of another coordinator.
    passed_on = altered(heard, coordinator=real.coordinator)
    assert passed_on.words != heard.words
    with refused(Code.JOIN_PROOF):
        lake.admit(passed_on)


def test_a_proof_that_is_missing_or_anothers_is_refused(lake) -> None:
    join, invite = lake.join(lake.invite()), lake.invite("east")
    other = lake.join(invite)
    for change in (
        {"identity_proof": "00" * 64},
        {"transport_proof": "00" * 70},
        {"identity_proof": other.identity_proof},
        {"transport_proof": other.transport_proof},
        {"name": "Other"},
        {"version": 2},
        {"coordinator": "ab" * 32},
        {"identity": "00" * 32},
        {"transport": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"},
        {"transport": join.transport + "\n"},
    ):
        with refused(Code.JOIN_PROOF):
            lake.admit(altered(join, **change))
    lake.admit(join)  # control


def test_a_hospital_cannot_change_what_it_was_invited_as(lake) -> None:
    invite = lake.invite()
    key, transport = SiteKey.generate(ENTROPY), new_transport()
    for change in ({"name": "Other"}, {"version": 7}):
        # Its own proof holds: it signed what it says.
        join = Join.make(invite.model_copy(update=change), key, transport)
        join.check_proof(bytes.fromhex(invite.token))
        with refused(Code.JOIN_PROOF):
            lake.admit(join)
    lake.admit(Join.make(invite, key, transport))  # control


def test_one_transport_key_has_one_form(lake) -> None:
    good = transport_public(new_transport())
    check_transport(good)
    p256 = ec.generate_private_key(ec.SECP256R1())
    for other in (good + b"\n", b"# a\n" + good, good[:-10], b"", transport_public(p256)):
        with refused(Code.BAD_KEY):
            check_transport(other)


def test_a_join_file_renamed_to_another_site_is_refused(lake) -> None:
    join = lake.join(lake.invite("east"))
    lake.join(lake.invite("west"))
    with refused(Code.INVITE_STALE):
        lake.admit(altered(join, site="west"))


def test_a_second_name_for_one_hospitals_key_is_refused(lake) -> None:
    lake.enrol("east")
    key = client.enrol.key_of(lake.hospital("east"), enrol.admitted(lake.state)[0].identity)
    for identity, transport in (
        (key, new_transport()),
        (
            SiteKey.generate(ENTROPY),
            client.enrol._transport(lake.hospital("east") / "transport.key"),
        ),
    ):
        join = Join.make(lake.invite("west"), identity, transport)
        with refused(Code.JOIN_KEYS):
            lake.admit(join)


@pytest.mark.parametrize("said", ["", "yes", "abandon " * 8])
def test_words_that_were_not_read_admit_nobody(lake, said: str) -> None:
    join = lake.join(lake.invite())
    with refused(Code.WORDS_DIFFER):
        lake.admit(join, said=said)
    lake.admit(join, said="  " + join.words.upper().replace(" ", ",  ") + "\n")


# --------------------------------------------------------------------- revoke, roster


def test_a_revoked_hospital_is_not_in_the_next_roster_and_its_keys_never_return(lake) -> None:
    lake.enrol("east", "north")
    gone = enrol.revoke(lake.state, "east")
    assert (gone.revoked, gone.since) == (True, 3)
    roster = lake.signed_roster().roster
    assert (roster.version, roster.sites) == (3, ("north",))
    assert [site.revoked for site in enrol.admitted(lake.state)] == [True, False]
    assert enrol.revoke(lake.state, "east").since == 3  # again is harmless
    # It may come back, with new keys only.
    invite = lake.invite("east")
    assert invite.version == 2
    old = client.enrol.key_of(lake.hospital("east"), gone.identity)
    transport = client.enrol._transport(lake.hospital("east") / "transport.key")
    with refused(Code.JOIN_KEYS):
        lake.admit(Join.make(invite, old, transport))
    back = lake.admit(lake.rotate(invite))
    assert (back.since, back.revoked) == (4, False)
    # Studies that list the key it was put out with go on without it; a rotated key is no such key.
    assert back.struck == gone.struck == {gone.identity}
    rotated = lake.admit(lake.rotate(lake.invite("east")))
    assert rotated.struck == {gone.identity}
    assert rotated.identity != back.identity
    assert lake.signed_roster().roster.sites == ("east", "north")


def test_revoking_closes_an_open_invite(lake) -> None:
    lake.enrol("east")
    join = lake.rotate(lake.invite("east"))
    enrol.revoke(lake.state, "east")
    with refused(Code.JOIN_UNINVITED):
        lake.admit(join)


def test_revoking_a_stranger_is_refused(lake) -> None:
    with refused(Code.SITE_UNKNOWN):
        enrol.revoke(lake.state, "nobody")


def test_the_version_goes_on_rising_when_everybody_has_left(lake) -> None:
    lake.enrol("east")
    enrol.revoke(lake.state, "east")
    assert not (lake.state / "roster.json").exists()
    lake.enrol("north")
    assert lake.signed_roster().roster.version == 3


def test_an_older_roster_put_back_on_disk_is_written_anew_and_refused_by_hospitals(lake) -> None:
    lake.enrol("east", "north")
    old = (lake.state / "roster.json").read_text()
    enrol.revoke(lake.state, "east")
    new = lake.signed_roster().roster
    (lake.state / "roster.json").write_text(old)
    key = enrol.coordinator_key(lake.state).public
    with refused(Code.ROSTER_ROLLBACK):
        SignedRoster.load(lake.state / "roster.json").verified(key, in_use=new)
    assert _settle(lake.state).roster == new
    assert lake.signed_roster().roster == new


def test_a_crash_between_site_and_roster_is_mended(lake) -> None:
    lake.enrol("east")
    before = (lake.state / "roster.json").read_bytes()
    invite_kept = lake.invite("west")
    waiting = (lake.state / "invites/west.json").read_bytes()
    join = lake.join(invite_kept)
    lake.admit(join)
    (lake.state / "roster.json").write_bytes(before)
    (lake.state / "invites/west.json").write_bytes(waiting)
    lake.admit(join)
    assert lake.signed_roster().roster.sites == ("east", "west")


def test_a_damaged_file_of_the_state_is_named(lake) -> None:
    lake.enrol("east")
    path = lake.state / "sites/east.json"
    good = path.read_bytes()
    for damaged in (good[:-20], b"", good.replace(b'"version": 1', b'"version": 0')):
        path.write_bytes(damaged)
        with refused(Code.ENROL_STATE) as caught:
            enrol.admitted(lake.state)
        assert str(path) in caught.value.message
    path.write_bytes(good)
    path.rename(lake.state / "sites/west.json")
    with refused(Code.ENROL_STATE):
        enrol.admitted(lake.state)


def test_two_commands_at_once_do_not_interleave(lake) -> None:
    with enrol._locked(lake.state), refused(Code.FOLDER_IN_USE):
        lake.invite()
    lake.invite()


# ------------------------------------------------------------------------------- rotate


def test_a_rotation_brings_new_keys_and_keeps_the_old_for_studies_under_way(lake) -> None:
    lake.enrol("east", "north")
    old = enrol.admitted(lake.state)[0]
    lake.now += 1
    invite = lake.invite("east")
    join = lake.rotate(invite)
    assert enrol.admitted(lake.state)[0] == old  # until it is admitted, the old keys are good
    new = lake.admit(join)
    assert (new.version, new.since) == (2, 3)
    assert old.identity != new.identity
    assert old.transport != new.transport
    state = lake.hospital("east")
    for each in (old, new):
        assert client.enrol.key_of(state, each.identity).public == each.identity
    newest, older = client.enrol.transport_keys(state)
    told = [transport_public(client.enrol._transport(path)) for path in (newest, older)]
    assert told == [new.transport, old.transport]
    assert lake.signed_roster().roster.keys()["east"] == new.identity
    with refused(Code.SITE_MISMATCH):
        client.enrol.key_of(state, enrol.admitted(lake.state)[1].identity)


def test_the_same_rotation_invite_again_gives_the_same_new_keys(lake) -> None:
    lake.enrol("east")
    invite = lake.invite("east")
    first, second = lake.rotate(invite), lake.rotate(invite)
    assert first.identity == second.identity
    assert first.transport == second.transport
    assert sorted(p.name for p in lake.hospital("east").glob("*-*.key")) == [
        "identity-1.key",
        "transport-1.key",
    ]


@pytest.mark.parametrize("writes", range(6))
def test_a_crash_anywhere_in_a_rotation_loses_no_key(lake, writes: int, monkeypatch) -> None:
    lake.enrol("east")
    old = enrol.admitted(lake.state)[0]
    invite = lake.invite("east")
    real, count = client.enrol.write_durably, 0

    class CrashError(Exception):
        pass

    def write(path, parts) -> None:
        nonlocal count
        if count == writes:
            raise CrashError
        count += 1
        real(path, parts)

    monkeypatch.setattr(client.enrol, "write_durably", write)
    monkeypatch.setattr("common.invite.write_durably", write)
    with pytest.raises(CrashError):
        lake.rotate(invite)
    monkeypatch.undo()
    state = lake.hospital("east")
    names = ("identity.key", "transport.key")
    made = {n: (state / n).read_bytes() for n in names}
    first = {n: (state / n.replace(".", "-1.")) for n in names}
    new = lake.admit(lake.rotate(invite))
    for name in names:  # a new key that was made before the crash is the one that stays
        if made[name] != first[name].read_bytes():
            assert (state / name).read_bytes() == made[name]
    assert new.identity != old.identity
    assert new.transport != old.transport
    for each in (old, new):
        assert client.enrol.key_of(state, each.identity).public == each.identity
    assert len(client.enrol.transport_keys(state)) == 2


def test_each_step_wants_its_own_invite(lake) -> None:
    first = lake.invite("east")
    with refused(Code.NOT_ENROLLED):
        lake.rotate(first)
    lake.admit(lake.join(first))
    with refused(Code.INVITE_OTHER_STEP):
        lake.rotate(first)
    with refused(Code.INVITE_OTHER_STEP):
        lake.join(lake.invite("east"))


def test_a_hospital_that_lost_its_disk_joins_again_with_new_keys(lake) -> None:
    lake.enrol("east")
    again = lake.join(lake.invite("east"), lake.root / "new-disk")
    assert lake.admit(again).version == 2


# --------------------------------------------------------------------------------- init


def test_initialising_again_changes_nothing(lake) -> None:
    def content() -> dict[str, bytes]:
        files = (path for path in lake.state.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    before = content()
    again = enrol.initialise(lake.config, lake.state, now=lake.now, entropy=ENTROPY)
    assert again.made == ()
    assert content() == before
    assert len(enrol.admin_token(lake.state)) == 64


def test_a_lost_coordinator_key_is_not_silently_replaced(lake) -> None:
    lake.invite()
    (lake.state / "identity.key").unlink()
    with refused(Code.NOT_INITIALISED):
        enrol.initialise(lake.config, lake.state, now=lake.now, entropy=ENTROPY)
    with refused(Code.NOT_INITIALISED):
        enrol.coordinator_key(lake.state)


def test_what_is_not_initialised_says_so(tmp_path) -> None:
    for ask in (enrol.coordinator_key, enrol.admin_token):
        with refused(Code.NOT_INITIALISED):
            ask(tmp_path)
    with refused(Code.NOT_ENROLLED):
        client.enrol.pinned(tmp_path)
    with refused(Code.NOT_ENROLLED):
        client.enrol.transport_keys(tmp_path)


def test_a_damaged_token_is_refused(lake) -> None:
    (lake.state / "admin.token").write_bytes(b"guess")
    with refused(Code.KEY_FILE_DAMAGED):
        enrol.admin_token(lake.state)
