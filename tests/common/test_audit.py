"""The audit log: every change of every record is found and named by its place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common import audit
from common.audit import AuditLog, keys_digest, run_audit_verify, verify, verify_folder, write_keys
from common.errors import Code, StorageError

NAMES = ("coordinator", "site-a", "site-b", "site-c")
KEYS = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([i + 1]) * 32) for i, name in enumerate(NAMES)
}
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}


def digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def opened(folder, owner, **override):
    options = {
        "owner": owner,
        "sign": KEYS[owner].sign,
        "clock": lambda: 1_700_000_000,
        "facts": {"keys": keys_digest(PUBLIC), "run": digest("run"), "software": "0.1.0"},
    }
    return AuditLog.open(folder / f"{owner}.jsonl", **{**options, **override})


def completed(number, survivors=NAMES[1:]):
    return {
        "round": number,
        "kind": "train",
        "uh2": digest("uh2", number),
        "commit": digest("commit", number),
        "survivors": list(survivors),
        "quorum": 3,
        "epsilon": 0.5 * number,
    }


def write_run(folder, rounds=3, *, finish=True, absent=None):
    """A run of four logs; `absent` is (site, round): that site misses that round."""
    folder.mkdir(parents=True, exist_ok=True)
    write_keys(folder, PUBLIC)
    for owner in NAMES:
        with opened(folder, owner) as log:
            for number in range(1, rounds + 1):
                survivors = [s for s in NAMES[1:] if (s, number) != absent]
                log.append("round.started", {"round": number, "kind": "train", "cohort": NAMES[1:]})
                if (owner, number) != absent:
                    log.append("round.completed", completed(number, survivors))
                log.checkpoint()
            if finish:
                log.finish()
    return folder


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def rehashed(records, start=0):
    """What an attacker without the key can do: make the chain whole again after a change."""
    head = audit.GENESIS if start == 0 else records[start - 1]["hash"]
    for index in range(start, len(records)):
        record = records[index]
        record["index"], record["prev"] = index, head
        record["hash"] = audit._record_hash({k: v for k, v in record.items() if k != "hash"})
        head = record["hash"]
    return b"".join(audit._canonical(record) + b"\n" for record in records)


# ------------------------------------------------------------------------- honest logs


def test_an_honest_run_is_verified_and_complete(tmp_path):
    report = verify_folder(write_run(tmp_path / "audit"))
    assert report.problems == ()
    assert report.verified
    assert report.complete
    assert len(report.logs) == 4
    assert report.entries == 4 * (1 + 3 * 3 + 2)
    assert report.checkpoints == 4 * 4
    assert report.verdict() == "audit verified: 4 logs, 48 records, 16 signatures, all rounds agree"
    assert run_audit_verify(tmp_path) == report
    json.dumps(report.to_json())


def test_a_record_is_one_canonical_line_and_the_chain_is_sha256(tmp_path):
    with opened(tmp_path, "site-a") as log:
        log.append(
            "site.dropped", {"round": 2, "kind": "train", "site": "site-b", "phase": "upload"}
        )
        head = log.head
    first, second = lines_of(tmp_path / "site-a.jsonl")
    body = json.loads(second)
    assert body["prev"] == json.loads(first)["hash"]
    claimed = body.pop("hash")
    plain = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    assert (
        claimed == hashlib.sha256(b"wardround/audit/record/1\0" + plain).hexdigest() == head.hex()
    )
    assert body["fields"] == {"kind": "train", "phase": "upload", "round": 2, "site": "site-b"}


def test_the_file_is_for_its_owner_only(tmp_path):
    opened(tmp_path, "site-a").close()
    assert (tmp_path / "site-a.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_checkpoint_brings_every_record_to_the_disk_before_it_returns(tmp_path, monkeypatch):
    log = opened(tmp_path, "site-a")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size))
    log.append("site.returned", {"round": 1, "kind": "train", "site": "site-b"})
    assert seen == []
    log.checkpoint()
    assert seen == [(tmp_path / "site-a.jsonl").stat().st_size]
    log.close()


def test_a_log_goes_on_where_it_stopped(tmp_path):
    log = opened(tmp_path, "site-a")
    log.append("study.stopped", {"reason": "kill-switch"})
    log.close()
    log = opened(tmp_path, "site-a")
    assert log.entries == 3
    log.finish()
    report = verify(tmp_path / "site-a.jsonl", PUBLIC["site-a"])
    assert report.complete
    assert report.entries == 5


@pytest.mark.parametrize("owner", ["site-a"])
def test_a_torn_tail_is_cut_at_every_byte_and_reported(tmp_path, owner):
    with opened(tmp_path, owner) as log:
        log.append("study.stopped", {"reason": "kill-switch"})
    path = tmp_path / f"{owner}.jsonl"
    whole = path.read_bytes()
    start = len(lines_of(path)[0])
    for cut in range(start + 1, len(whole)):
        path.write_bytes(whole[:cut])
        torn = verify(path, PUBLIC[owner])
        assert torn.verified
        assert not torn.complete
        assert any("torn" in p.message for p in torn.problems)
        with opened(tmp_path, owner) as log:
            assert log.cut_bytes == cut - start
            assert log.entries == 2
        record = json.loads(lines_of(path)[1])
        assert (record["event"], record["fields"]) == ("log.reopened", {"cut_bytes": cut - start})


# ---------------------------------------------------------------------- the tamper table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "audit")


LENGTH = 12


def tampered(run, tmp_path, change, *, rehash):
    records = [json.loads(line) for line in lines_of(run / "site-a.jsonl")]
    assert len(records) == LENGTH
    change(records)
    path = tmp_path / "site-a.jsonl"
    if rehash:
        path.write_bytes(rehashed(records))
    else:
        path.write_bytes(b"".join(audit._canonical(r) + b"\n" for r in records))
    return verify(path, PUBLIC["site-a"])


def delete(index):
    return lambda records: records.pop(index)


def swap(index):
    def change(records):
        records[index], records[index + 1] = records[index + 1], records[index]

    return change


def insert(index):
    return lambda records: records.insert(index, dict(records[max(0, index - 1)]))


def alter(index):
    def change(records):
        records[index]["at"] += 1

    return change


def cut(index):
    def change(records):
        del records[index:]

    return change


@pytest.mark.parametrize("index", range(LENGTH))
@pytest.mark.parametrize("rehash", [False, True])
def test_an_altered_record_is_located(run, tmp_path, index, rehash):
    report = tampered(run, tmp_path, alter(index), rehash=rehash)
    assert not report.verified
    if rehash:  # the chain is whole again, so the next signature is what breaks
        assert report.problems[0].index == next(k for k in (3, 6, 9, 11) if k >= index)
        assert "signature" in report.problems[0].message
    else:
        assert report.problems[0].index == index
        assert "altered" in report.problems[0].message
        assert all(p.index == index for p in report.problems if p.severity == "altered")


@pytest.mark.parametrize("index", range(LENGTH - 1))
@pytest.mark.parametrize("rehash", [False, True])
def test_a_deleted_record_is_located(run, tmp_path, index, rehash):
    report = tampered(run, tmp_path, delete(index), rehash=rehash)
    assert not report.verified
    if not rehash:
        assert report.problems[0].index == index
        if index:
            assert "1 record is missing before it" in report.problems[0].message


@pytest.mark.parametrize("index", range(LENGTH - 1))
@pytest.mark.parametrize("rehash", [False, True])
def test_swapped_records_are_located(run, tmp_path, index, rehash):
    report = tampered(run, tmp_path, swap(index), rehash=rehash)
    assert not report.verified
    if not rehash:
        assert report.problems[0].index == index


@pytest.mark.parametrize("index", range(1, LENGTH))
@pytest.mark.parametrize("rehash", [False, True])
def test_an_inserted_record_is_located(run, tmp_path, index, rehash):
    report = tampered(run, tmp_path, insert(index), rehash=rehash)
    assert not report.verified
    if not rehash:
        assert report.problems[0].index == index
        assert "inserted or moved" in report.problems[0].message


@pytest.mark.parametrize("length", range(LENGTH))
def test_a_truncated_log_never_looks_complete(run, tmp_path, length):
    report = tampered(run, tmp_path, cut(length), rehash=False)
    assert not report.complete
    assert not report.closed
    last = report.problems[-1]
    if length == 0:
        assert "empty" in last.message
    elif length in (4, 7, 10):  # cut right after a checkpoint
        assert (last.index, last.severity) == (length, "open")
        assert "not closed" in last.message
    else:
        assert "unsigned tail" in last.message
        assert last.index == max(k for k in (0, 4, 7, 10) if k <= length)


@pytest.mark.parametrize("index", range(LENGTH))
def test_every_flipped_byte_of_a_record_is_found(run, tmp_path, index):
    lines = lines_of(run / "site-a.jsonl")
    path = tmp_path / "site-a.jsonl"
    for place in range(0, len(lines[index]), 7):
        line = bytearray(lines[index])
        line[place] ^= 1
        path.write_bytes(b"".join([*lines[:index], bytes(line), *lines[index + 1 :]]))
        report = verify(path, PUBLIC["site-a"])
        assert not report.complete, place
        assert report.problems[0].index in (index, index + 1)


def test_a_record_of_another_chain_is_found_by_its_link(run, tmp_path):
    """Right place, right hash, wrong history: only the link to the record before it tells."""
    lines = lines_of(run / "site-a.jsonl")
    body = json.loads(lines[-1])
    del body["hash"]
    body["prev"] = digest("another chain")
    forged = {**body, "hash": audit._record_hash(body)}
    path = tmp_path / "site-a.jsonl"
    for end in (5, 8):
        other = {**json.loads(lines[end]), "prev": digest("another chain")}
        del other["hash"]
        other["hash"] = audit._record_hash(other)
        path.write_bytes(b"".join([*lines[:end], audit._canonical(other) + b"\n"]))
        report = verify(path, PUBLIC["site-a"])
        assert not report.verified
        assert report.problems[0].index == end
        assert "does not follow" in report.problems[0].message
    path.write_bytes(b"".join([*lines[:-1], audit._canonical(forged) + b"\n"]))
    assert not verify(path, PUBLIC["site-a"]).verified


def test_a_closed_log_whose_last_signature_is_forged_is_not_closed(run, tmp_path):
    lines = lines_of(run / "site-a.jsonl")
    body = json.loads(lines[-1])
    del body["hash"]
    body["fields"] = {"signature": "00" * 64}
    path = tmp_path / "site-a.jsonl"
    forged = {**body, "hash": audit._record_hash(body)}
    path.write_bytes(b"".join([*lines[:-1], audit._canonical(forged) + b"\n"]))
    report = verify(path, PUBLIC["site-a"])
    assert not report.closed
    assert not report.verified


def test_a_record_written_in_another_way_is_not_a_record(run, tmp_path):
    lines = lines_of(run / "site-a.jsonl")
    path = tmp_path / "site-a.jsonl"
    first = lines[1].decode()
    for same in (
        first.replace(":", ": ", 1),
        first.replace('"kind"', '"kind":"train","kind"', 1),
        first.replace('"round":1', '"round":1.0', 1),
        json.dumps(json.loads(first)) + "\n",
        "\n",
        "[]\n",
        "{}\n",
        "[" * 30_000 + "\n",
    ):
        assert same != first
        path.write_bytes(b"".join([lines[0], same.encode(), *lines[2:]]))
        report = verify(path, PUBLIC["site-a"])
        assert not report.verified
        assert report.problems[0].index == 1


def test_another_key_signs_nothing(run):
    report = verify(run / "site-a.jsonl", PUBLIC["site-b"])
    assert not report.verified
    assert report.checkpoints == 0
    assert [p.index for p in report.problems if p.severity == "altered"] == [3, 6, 9, 11]


def test_a_log_under_another_name_is_not_that_partys(run, tmp_path):
    path = tmp_path / "site-b.jsonl"
    path.write_bytes((run / "site-a.jsonl").read_bytes())
    report = verify(path, PUBLIC["site-a"])
    assert not report.verified
    assert "another log" in report.problems[0].message


def test_the_control_without_signatures_a_rehashed_log_passes(run, tmp_path, monkeypatch):
    """Positive control: with checkpoints unchecked, an attacker who rehashes is not seen."""
    monkeypatch.setattr(audit, "_checker", lambda _: lambda signature, message: True)
    report = tampered(run, tmp_path, alter(1), rehash=True)
    assert report.complete


def test_the_control_without_the_chain_an_altered_record_passes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(audit._Walk, "_check_chain", lambda *_: None)
    assert tampered(run, tmp_path, alter(1), rehash=False).complete


# --------------------------------------------------------------------------- many logs


def test_logs_that_name_another_round_are_found(tmp_path):
    folder = write_run(tmp_path)
    (folder / "site-b.jsonl").unlink()
    with opened(folder, "site-b") as log:
        for number in (1, 2, 3):
            log.append("round.completed", {**completed(number), "commit": digest("lie", number)})
        log.finish()
    assert verify(folder / "site-b.jsonl", PUBLIC["site-b"]).complete, "alone it looks well"
    report = verify_folder(folder)
    assert not report.verified
    blamed = [p for p in report.problems if p.log == "site-b"]
    assert len(blamed) == 3
    assert "round 1 has another transcript than in coordinator" in blamed[0].message
    assert report.verdict().startswith("AUDIT BROKEN: 3 problems; first: site-b: record 1:")


def test_a_site_that_dropped_out_need_not_know_the_round(tmp_path):
    assert verify_folder(write_run(tmp_path, absent=("site-b", 2))).complete


def test_a_survivor_that_does_not_know_its_round_is_found(tmp_path):
    folder = write_run(tmp_path)
    (folder / "site-b.jsonl").unlink()
    with opened(folder, "site-b") as log:
        for number in (1, 3):
            log.append("round.completed", completed(number))
        log.finish()
    report = verify_folder(folder)
    assert not report.verified
    assert [str(p) for p in report.problems] == [
        "site-b: record 5: coordinator records train round 2 with this site; it does not"
    ]


def test_a_log_cut_at_a_signed_checkpoint_is_found_by_the_others(tmp_path):
    folder = write_run(tmp_path)
    path = folder / "site-c.jsonl"
    path.write_bytes(b"".join(lines_of(path)[:4]))
    report = verify_folder(folder)
    assert not report.complete
    messages = [p.message for p in report.problems]
    assert any("not closed" in m for m in messages)
    assert sum("with this site; it does not" in m for m in messages) == 2
    assert report.verdict().startswith("audit intact but not closed")


def test_a_missing_log_a_strange_log_and_other_keys_are_found(tmp_path):
    folder = write_run(tmp_path)
    (folder / "site-c.jsonl").rename(folder / "site-d.jsonl")
    messages = {p.log: p.message for p in verify_folder(folder).problems}
    assert messages == {
        "site-c": "the log of this party is missing",
        "site-d": "no key is known for this log",
    }
    (folder / "site-d.jsonl").unlink()
    write_keys(folder, {name: key for name, key in PUBLIC.items() if name != "site-c"})
    report = verify_folder(folder)
    assert {p.log for p in report.problems} == {"coordinator", "site-a", "site-b"}
    assert all("other keys" in p.message for p in report.problems)
    assert not report.verified


def test_keys_from_a_trusted_place_win_over_the_folders_own(tmp_path):
    """Somebody who owns the whole folder can forge it with new keys; a trusted table shows it."""
    forged = {name: Ed25519PrivateKey.generate() for name in NAMES}
    public = {name: key.public_key().public_bytes_raw() for name, key in forged.items()}
    write_keys(tmp_path, public)
    for owner in NAMES:
        facts = {"keys": keys_digest(public)}
        with opened(tmp_path, owner, sign=forged[owner].sign, facts=facts) as log:
            log.append("round.completed", completed(1))
            log.finish()
    assert verify_folder(tmp_path).complete, "the control: alone the folder looks well"
    assert not verify_folder(tmp_path, PUBLIC).verified


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"site-a": 5}', '{"site-a": "00"}', '{"A!": "' + "00" * 32 + '"}']
)
def test_a_broken_table_of_keys_is_refused(tmp_path, text):
    folder = write_run(tmp_path, rounds=1)
    (folder / "keys.json").write_text(text)
    with pytest.raises(StorageError) as caught:
        verify_folder(folder)
    assert caught.value.code is Code.AUDIT_KEYS


def test_a_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(StorageError) as caught:
        run_audit_verify(tmp_path)
    assert caught.value.code is Code.AUDIT_MISSING


# ------------------------------------------------------------------------ what may enter


@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("note", {}),
        ("round.started", {"text": "x"}),
        ("round.started", {"site": "site-a"}),
        ("round.started", {"round": -1}),
        ("round.started", {"round": True}),
        ("round.started", {"round": "1"}),
        ("round.started", {"kind": "two words"}),
        ("round.started", {"kind": "a" * 65}),
        ("round.started", {"header": "abc"}),
        ("round.started", {"cohort": ["Site A"]}),
        ("round.started", {"cohort": "site-a"}),
        ("round.completed", {"epsilon": float("nan")}),
        ("round.completed", {"epsilon": "3"}),
        ("round.aborted", {"code": "boom"}),
        ("round.aborted", {"reason": "Patient 7 has asthma"}),
        ("checkpoint", {}),
        ("log.closed", {}),
    ],
)
def test_what_is_not_on_the_allow_list_cannot_be_written(tmp_path, event, fields):
    with opened(tmp_path, "site-a") as log:
        size = log.path.stat().st_size
        with pytest.raises(ValueError, match=r"allow list|is not a|itself writes"):
            log.append(event, fields)
        assert log.path.stat().st_size == size


def test_every_allowed_field_has_a_kind():
    named = {name for fields in audit._EVENTS.values() for name in fields}
    assert named == set(audit._FIELD_KIND)
    assert set(audit._FIELD_KIND.values()) == set(audit._KINDS)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_either_a_canonical_record_or_none(data):
    record = audit._parse(data + b"\n")
    assert record is None or audit._canonical(record) == data


# --------------------------------------------------------------------- a disk that fails


def test_a_full_disk_leaves_the_old_end_and_says_so(tmp_path, monkeypatch):
    log = opened(tmp_path, "site-a")
    before = log.path.read_bytes()
    real = os.write

    def full(descriptor, data):
        if len(data) > 10:
            return real(descriptor, bytes(data)[:10])
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(
        os, "write", lambda fd, data: full(fd, data) if len(data) > 100 else full(fd, b"")
    )
    with pytest.raises(StorageError) as caught:
        log.append("study.stopped", {"reason": "kill-switch"})
    monkeypatch.undo()
    assert caught.value.code is Code.AUDIT_WRITE
    assert log.path.read_bytes() == before
    with pytest.raises(StorageError):
        log.append("study.stopped", {"reason": "kill-switch"})
    log.close()
    with opened(tmp_path, "site-a") as again:
        assert again.cut_bytes == 0


def test_two_writers_are_noticed(tmp_path):
    first, second = opened(tmp_path, "site-a"), opened(tmp_path, "site-a")
    with pytest.raises(StorageError) as caught:
        first.append("study.stopped", {"reason": "kill-switch"})
    assert caught.value.code is Code.AUDIT_CHANGED
    second.append("study.stopped", {"reason": "kill-switch"})
    first.close()
    second.close()


def test_a_broken_log_is_not_continued(tmp_path):
    with opened(tmp_path, "site-a") as log:
        log.append("study.stopped", {"reason": "kill-switch"})
    path = tmp_path / "site-a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"kill-switch", b"kill-swatch"))
    with pytest.raises(StorageError) as caught:
        opened(tmp_path, "site-a")
    assert caught.value.code is Code.AUDIT_BROKEN
    assert "record 1" in caught.value.message


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        opened(tmp_path / "file", "site-a")
    assert caught.value.code is Code.AUDIT_WRITE


def test_verification_is_light():
    """`wardround audit verify` answers in 0.3 CPU-seconds, so nothing heavy may be imported."""
    script = "import sys, common.audit; print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy','pydantic','rich','torch','yaml','structlog'}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------- a survivor that missed the certificate


def write_crashed(folder, *, trace, site="site-b", number=2):
    """A run in which `site` survives round `number` without seeing its certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    write_keys(folder, PUBLIC)
    for owner in NAMES:
        with opened(folder, owner) as log:
            for current in (1, 2, 3):
                if (owner, current) == (site, number):
                    if trace is not None:
                        log.append(*trace)
                else:
                    log.append("round.completed", completed(current))
                log.checkpoint()
            log.finish()
    return folder


@pytest.mark.parametrize(
    "trace",
    [
        ("round.agreed", {"round": 2, "uh2": digest("uh2", 2)}),
        ("round.unmasked", {"round": 2, "uh2": digest("uh2", 2)}),
        ("round.uploaded", {"round": 2, "kind": "train", "uh1": digest(1), "root": digest(2)}),
    ],
    ids=lambda trace: trace[0],
)
def test_a_survivor_that_crashed_before_the_certificate_is_in_order(tmp_path, trace):
    report = verify_folder(write_crashed(tmp_path / "audit", trace=trace))
    assert report.problems == ()
    assert report.verified
    assert report.complete


def test_a_survivor_whose_log_says_nothing_of_the_round_is_a_problem(tmp_path):
    report = verify_folder(write_crashed(tmp_path / "audit", trace=None))
    assert not report.verified
    (problem,) = report.problems
    assert problem.log == "site-b"
    assert "train round 2 with this site" in problem.message


def test_a_trace_of_another_round_does_not_excuse(tmp_path):
    trace = ("round.agreed", {"round": 3, "uh2": digest("uh2", 3)})
    assert not verify_folder(write_crashed(tmp_path / "audit", trace=trace)).verified


@pytest.mark.parametrize("event", ["round.agreed", "round.unmasked"])
def test_agreeing_to_other_survivors_than_the_others_is_a_problem(tmp_path, event):
    trace = (event, {"round": 2, "uh2": digest("a split view", 2)})
    report = verify_folder(write_crashed(tmp_path / "audit", trace=trace))
    assert not report.verified
    assert [problem.log for problem in report.problems] == ["site-b"]
    assert "other survivors of round 2" in report.problems[0].message
