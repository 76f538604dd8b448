"""The ledger under crashes, caps, tampering, rollback, full disks and two processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.privacy.ledger import EMPTY_HEAD, Charge, HeldOutSplit, Ledger, RoundId
from common.accountant import DpEvent, epsilon
from common.errors import Code, RefusedError, StorageError
from common.world import ManualClock, SeededEntropy

DELTA = 1e-5
STEPS = DpEvent(1.0, 0.0256, 10)
METRICS = DpEvent(30.0, 1.0, 1)
TRAIN = Charge("train", "train", (STEPS,))
EVALUATE = Charge("evaluate", "held_out", (METRICS,))
STUDY = hashlib.sha256(b"study").digest()


def opened(path: Path, *, cap: float = 8.0, delta: float = DELTA) -> Ledger:
    return Ledger.open(
        path, epsilon_cap=cap, delta=delta, clock=ManualClock(), entropy=SeededEntropy("ledger")
    )


def round_id(number: int, *, study: bytes = STUDY) -> RoundId:
    return RoundId(study, "run-1", number)


def refused(code: Code):
    return pytest.raises(RefusedError, check=lambda error: error.code is code)


def failed(code: Code):
    return pytest.raises(StorageError, check=lambda error: error.code is code)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    ledger = opened(path)
    yield ledger
    ledger.close()


@pytest.fixture
def split_id(ledger):
    return ledger.split(0.2).identity


# ---------------------------------------------------------------------- spending


def test_a_new_ledger_has_spent_nothing_and_names_its_terms(ledger, path):
    spending = ledger.spent()
    assert (spending.epsilon, spending.cap, spending.delta, spending.rows) == (0.0, 8.0, DELTA, 1)
    (genesis,) = ledger.history()
    assert genesis.body["unit"] == "patient"
    assert genesis.body["relation"] == "add-or-remove-one"
    assert "split_key" not in genesis.body
    assert path.stat().st_mode & 0o077 == 0


def test_a_round_costs_what_its_events_cost_and_rounds_compose(ledger, split_id):
    first = ledger.reserve_round(round_id(1), [TRAIN, EVALUATE], split_id)
    assert first.epsilon_after == pytest.approx(epsilon([STEPS], DELTA))
    assert (first.first_sequence, first.sequence, ledger.counter) == (2, 3, 3)
    for number in range(2, 6):
        last = ledger.reserve_round(round_id(number), [TRAIN, EVALUATE], split_id)
    assert last.epsilon_after == epsilon([DpEvent(1.0, 0.0256, 50)], DELTA)
    assert ledger.spent().held_out == epsilon([DpEvent(30.0, 1.0, 5)], DELTA)


def test_training_and_held_out_patients_compose_in_parallel_under_one_split(ledger, split_id):
    loud = Charge("evaluate", "held_out", (DpEvent(0.9, 1.0, 1),))
    after = ledger.reserve_round(round_id(1), [TRAIN, loud], split_id).epsilon_after
    spending = ledger.spent()
    assert after == max(spending.train, spending.held_out) == spending.held_out
    assert after < epsilon([STEPS, *loud.events], DELTA)


def test_under_a_second_split_everything_composes_one_after_another(ledger):
    ledger.reserve_round(round_id(1), [TRAIN, EVALUATE], ledger.split(0.2).identity)
    ledger.reserve_round(round_id(2), [TRAIN, EVALUATE], ledger.split(0.3).identity)
    doubled = [DpEvent(1.0, 0.0256, 20), DpEvent(30.0, 1.0, 2)]
    assert ledger.spent().epsilon == epsilon(doubled, DELTA)
    assert ledger.spent().splits == 2


def test_work_on_all_patients_counts_on_both_parts(ledger, split_id):
    everybody = Charge("evaluate", "all", (METRICS,))
    ledger.reserve_round(round_id(1), [TRAIN, EVALUATE, everybody], split_id)
    spending = ledger.spent()
    assert spending.train == epsilon([STEPS, METRICS], DELTA)
    assert spending.held_out == epsilon([METRICS, METRICS], DELTA)


def test_a_round_beyond_the_cap_is_refused_with_the_numbers_and_writes_nothing(ledger, split_id):
    big = Charge("train", "train", (DpEvent(0.7137, 0.0256, 400),))
    spent = ledger.reserve_round(round_id(1), [big], split_id).epsilon_after
    head = ledger.head
    more = Charge("train", "train", (DpEvent(0.7137, 0.0256, 200),))
    with refused(Code.BUDGET_EXCEEDED) as caught:
        ledger.reserve_round(round_id(2), [more], split_id)
    would = epsilon([DpEvent(0.7137, 0.0256, 600)], DELTA)
    for number in (spent, would, 8.0):
        assert f"{number:.3f}" in caught.value.message
    assert (ledger.head, ledger.counter) == (head, 2)
    ledger.reserve_round(round_id(2), [TRAIN], split_id)  # a smaller one still fits


def test_one_cap_binds_every_study_on_the_same_patients(ledger, split_id):
    big = Charge("train", "train", (DpEvent(0.7137, 0.0256, 400),))
    ledger.reserve_round(round_id(1), [big], split_id)
    other = RoundId(hashlib.sha256(b"other study").digest(), "run-9", 1)
    with refused(Code.BUDGET_EXCEEDED):
        ledger.reserve_round(other, [big], split_id)
    # Control: a fresh ledger per study would let it through.
    assert epsilon(list(big.events), DELTA) < 8.0


def test_a_retry_is_charged_again_as_the_next_attempt(ledger, split_id):
    first = ledger.reserve_round(round_id(1), [TRAIN], split_id)
    second = ledger.reserve_round(round_id(1), [TRAIN], split_id)
    assert (first.attempt, second.attempt) == (1, 2)
    assert second.epsilon_after > first.epsilon_after


def test_a_reservation_may_be_voided_only_before_training_and_only_by_its_maker(
    path, ledger, split_id
):
    kept = ledger.reserve_round(round_id(1), [TRAIN, EVALUATE], split_id)
    before = ledger.spent().epsilon
    unused = ledger.reserve_round(round_id(2), [TRAIN, EVALUATE], split_id)
    ledger.void(unused)
    assert ledger.spent().epsilon == before
    with refused(Code.RESERVATION_BEGUN):
        ledger.void(unused)
    begun = ledger.reserve_round(round_id(3), [TRAIN], split_id)
    ledger.begin(begun)
    with refused(Code.RESERVATION_BEGUN):
        ledger.void(begun)
    again = opened(path)
    with refused(Code.RESERVATION_BEGUN):
        again.void(kept)
    assert again.spent() == ledger.spent()
    again.verify()
    again.close()


def test_showing_what_was_spent_loads_no_accountant_and_says_what_composing_says(path):
    filled(path)
    script = (
        "import sys; from pathlib import Path; from client.privacy.ledger import Ledger; "
        "from common.world import ManualClock; "
        "ledger = Ledger.open_existing(Path(sys.argv[1]), clock=ManualClock()); "
        "print(ledger.spent().epsilon, len(ledger.history())); "
        "assert not {'torch', 'dp_accounting', 'scipy'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    shown = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment, capture_output=True, check=True
    )
    assert shown.stdout.split() == [str(epsilon([DpEvent(1.0, 0.0256, 20)], DELTA)).encode(), b"6"]


def test_a_release_is_noted_and_costs_nothing(ledger, split_id):
    reservation = ledger.reserve_round(round_id(1), [TRAIN], split_id)
    before = ledger.spent().epsilon
    ledger.release(reservation)
    assert ledger.spent().epsilon == before
    assert [row.kind for row in ledger.history()] == ["genesis", "charge", "release"]
    with refused(Code.RESERVATION_BEGUN):
        ledger.void(reservation)


def test_a_cap_is_raised_only_explicitly_and_only_upwards(path, ledger, split_id):
    big = Charge("train", "train", (DpEvent(0.7137, 0.0256, 600),))
    ledger.close()
    generous = opened(path, cap=100.0)  # a larger number in a file changes nothing
    with refused(Code.BUDGET_EXCEEDED):
        generous.reserve_round(round_id(1), [big], split_id)
    with refused(Code.BUDGET_CAP):
        generous.raise_cap(8.0)
    generous.raise_cap(12.0)
    generous.reserve_round(round_id(1), [big], split_id)
    generous.close()
    strict = opened(path, cap=4.0)  # a smaller one binds
    assert strict.spent().cap == 4.0
    with refused(Code.BUDGET_EXCEEDED):
        strict.reserve_round(round_id(2), [TRAIN], split_id)
    strict.close()


def test_a_ledger_keeps_the_delta_it_was_founded_on(path, ledger):
    with refused(Code.BUDGET_DELTA):
        opened(path, delta=1e-6)


def test_the_forecast_is_the_number_of_rounds_that_are_then_granted(path):
    ledger = opened(path, cap=1.4)
    split_id = ledger.split(0.2).identity
    forecast = ledger.rounds_left([TRAIN, EVALUATE], split_id)
    granted = 0
    with refused(Code.BUDGET_EXCEEDED):
        for number in range(1, 200):
            ledger.reserve_round(round_id(number), [TRAIN, EVALUATE], split_id)
            granted += 1
    assert granted == forecast > 3
    assert ledger.rounds_left([TRAIN, EVALUATE], split_id) == 0
    ledger.close()


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from(["train", "held_out", "all"]),
            st.sampled_from([0.8, 1.5, 6.0]),
            st.sampled_from([0.05, 1.0]),
            st.sampled_from(["a", "b"]),
        ),
        max_size=6,
    )
)
def test_spending_never_falls_never_passes_the_cap_and_survives_reopening(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("ledger") / "l.sqlite"
    ledger, last = opened(path, cap=6.0), 0.0
    for number, (part, sigma, rate, split) in enumerate(plan, start=1):
        charge = Charge("train", part, (DpEvent(sigma, rate, 2),))
        try:
            after = ledger.reserve_round(round_id(number), [charge], split).epsilon_after
        except RefusedError:
            after = ledger.spent().epsilon
        assert last <= after + 1e-12
        assert after <= 6.0 + 1e-9
        last = after
    again = opened(path, cap=6.0)
    assert again.spent() == ledger.spent()
    assert (again.head, again.counter) == (ledger.head, ledger.counter)
    again.close()
    ledger.close()


# ---------------------------------------------------------------------- crashes and processes

_CHILD = """
import os, signal, sys
from pathlib import Path
from client.privacy.ledger import Charge, Ledger, RoundId
from common.accountant import DpEvent
from common.world import SystemEntropy, WallClock
ledger = Ledger.open(Path(sys.argv[1]), epsilon_cap=8.0, delta=1e-5, clock=WallClock(),
                     entropy=SystemEntropy())
for number in range(int(sys.argv[2])):
    ledger.reserve_round(RoundId(bytes(32), sys.argv[3], number + 1),
                         [Charge("train", "train", (DpEvent(20.0, 1.0, 1),))], "split")
if sys.argv[4] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def child(path: Path, rounds: int, run: str, ending: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(path), str(rounds), run, ending],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )


def test_a_process_killed_inside_a_round_stays_charged(path):
    process = child(path, 3, "run", "die")
    assert process.wait(60) == -signal.SIGKILL
    ledger = opened(path)
    assert ledger.counter == 4
    assert ledger.spent().epsilon == epsilon([DpEvent(20.0, 1.0, 3)], DELTA)
    ledger.verify()
    ledger.close()


def test_two_processes_share_one_chain_and_one_budget(path):
    both = [child(path, 12, run, "end") for run in ("left", "right")]
    assert [process.wait(60) for process in both] == [0, 0]
    ledger = opened(path)
    assert ledger.counter == 25
    assert ledger.spent().epsilon == epsilon([DpEvent(20.0, 1.0, 24)], DELTA)
    ledger.verify()
    ledger.close()


def test_what_another_handle_appended_is_weighed_before_the_next_reservation(path, split_id):
    left, right = opened(path), opened(path)
    big = Charge("train", "train", (DpEvent(0.7137, 0.0256, 400),))
    left.reserve_round(round_id(1), [big], split_id)
    with refused(Code.BUDGET_EXCEEDED):
        right.reserve_round(round_id(1), [big], split_id)
    assert right.spent() == left.spent()
    assert right.head == left.head
    left.close()
    right.close()


def test_threads_of_one_process_are_charged_one_after_another(ledger, split_id):
    quiet = Charge("train", "train", (DpEvent(50.0, 1.0, 1),))

    def work(number: int) -> None:
        ledger.reserve_round(round_id(number), [quiet], split_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.spent().epsilon == epsilon([DpEvent(50.0, 1.0, 8)], DELTA)
    ledger.verify()


# ---------------------------------------------------------------------- tampering and rollback


def filled(path: Path) -> list[bytes]:
    """A ledger of six rows, closed; its heads."""
    ledger = opened(path)
    split_id = ledger.split(0.2).identity
    for number in (1, 2):
        ledger.reserve_round(round_id(number), [TRAIN, EVALUATE], split_id)
    ledger.raise_cap(9.0)
    heads = [ledger.head_at(counter) for counter in range(ledger.counter + 1)]
    ledger.close()
    return heads


def rewrite(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER ledger_is_append_only_update")
        connection.execute("DROP TRIGGER ledger_is_append_only_delete")
        for statement in statements:
            connection.execute(statement)
    connection.close()


def test_sql_cannot_change_or_delete_a_row(path):
    filled(path)
    connection = sqlite3.connect(path)
    for statement in ("UPDATE ledger SET body = '{}'", "DELETE FROM ledger"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("row", range(1, 7))
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE ledger SET body = body || ' ' WHERE sequence = {row}",
        "UPDATE ledger SET head = zeroblob(32) WHERE sequence = {row}",
    ],
    ids=["body", "head"],
)
def test_tampering_with_any_row_is_found_and_the_row_named(path, row, change):
    filled(path)
    rewrite(path, change.format(row=row))
    with failed(Code.LEDGER_TAMPERED) as caught:
        opened(path)
    assert f"row {row} " in caught.value.message


@pytest.mark.parametrize("row", range(1, 6))
def test_removing_any_row_but_the_last_is_found(path, row):
    filled(path)
    rewrite(path, f"DELETE FROM ledger WHERE sequence = {row}")  # noqa: S608 - a number of ours
    with failed(Code.LEDGER_TAMPERED):
        opened(path)


def test_tampering_while_the_ledger_is_open_is_found(path):
    filled(path)
    ledger = opened(path)
    rewrite(path, "UPDATE ledger SET body = replace(body, '10', '1') WHERE sequence = 2")
    with failed(Code.LEDGER_TAMPERED) as caught:
        ledger.verify()
    assert "row 2 " in caught.value.message
    ledger.close()


def test_cutting_the_end_off_is_found_at_once_in_the_open_ledger(path):
    filled(path)
    ledger = opened(path)
    rewrite(path, "DELETE FROM ledger WHERE sequence >= 4")
    with failed(Code.LEDGER_TAMPERED):
        ledger.reserve_round(round_id(3), [TRAIN], "split")
    ledger.close()


def test_a_restored_older_ledger_lacks_a_head_that_others_witnessed(path, tmp_path):
    heads = filled(path)
    backup = tmp_path / "backup"
    shutil.copy(path, backup)
    ledger = opened(path)
    ledger.reserve_round(round_id(3), [TRAIN], ledger.split(0.2).identity)
    witnessed = (ledger.counter, ledger.head)
    assert ledger.contains(*witnessed)
    ledger.close()
    path.unlink()
    shutil.copy(backup, path)
    restored = opened(path)  # the chain itself is whole: only the witness can tell
    restored.verify()
    assert not restored.contains(*witnessed)
    assert all(restored.contains(counter, head) for counter, head in enumerate(heads))
    # A branch of the same length is not it either.
    restored.reserve_round(round_id(7), [TRAIN], restored.split(0.2).identity)
    assert restored.counter == witnessed[0]
    assert not restored.contains(*witnessed)
    restored.close()


def test_heads_are_counted_from_an_empty_ledger(path):
    heads = filled(path)
    ledger = opened(path)
    assert heads[0] == EMPTY_HEAD
    assert heads[-1] == ledger.head
    assert len(set(heads)) == 7
    assert not ledger.contains(7, ledger.head)
    with pytest.raises(ValueError, match="rows"):
        ledger.head_at(7)
    ledger.close()


# ---------------------------------------------------------------------- files that fail


def test_a_file_that_is_no_ledger_is_named_so(path):
    path.write_bytes(b"patient,text,label\n" * 500)
    with failed(Code.LEDGER_DAMAGED):
        opened(path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with failed(Code.LEDGER_DAMAGED):
        opened(path)


def test_a_missing_folder_and_a_missing_ledger_are_named_so(tmp_path):
    with failed(Code.LEDGER_WRITE):
        opened(tmp_path / "nowhere" / "ledger.sqlite")
    with failed(Code.LEDGER_MISSING):
        Ledger.open_existing(tmp_path / "ledger.sqlite", clock=ManualClock())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pragma", ["PRAGMA max_page_count = 5", "PRAGMA query_only = 1"])
def test_a_full_disk_or_a_read_only_file_fails_before_training_and_loses_nothing(
    path, ledger, split_id, pragma
):
    ledger.reserve_round(round_id(1), [TRAIN], split_id)
    before = (ledger.head, ledger.counter, ledger.spent())
    ledger._connection.execute(pragma)
    many = [TRAIN] * 40
    with failed(Code.LEDGER_WRITE):
        ledger.reserve_round(round_id(2), many, split_id)
    assert (ledger.head, ledger.counter, ledger.spent()) == before
    ledger._connection.execute("PRAGMA query_only = 0")
    ledger.verify()


def test_a_ledger_held_by_another_process_is_busy_not_broken(path, ledger, split_id):
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    ledger._connection.execute("PRAGMA busy_timeout = 1")
    with failed(Code.LEDGER_BUSY):
        ledger.reserve_round(round_id(1), [TRAIN], split_id)
    other.execute("ROLLBACK")
    other.close()
    ledger.reserve_round(round_id(1), [TRAIN], split_id)


def test_no_trace_of_founding_is_left_and_rows_are_plain_json(path):
    filled(path)
    assert {entry.name for entry in path.parent.iterdir()} == {path.name}
    connection = sqlite3.connect(path)
    for (body,) in connection.execute("SELECT body FROM ledger"):
        assert json.dumps(json.loads(body), sort_keys=True, separators=(",", ":")) == body
    connection.close()


# ---------------------------------------------------------------------- the split


def test_the_split_is_fixed_keyed_and_about_as_large_as_asked(path):
    first = opened(path)
    split = first.split(0.2)
    names = [f"patient-{number}" for number in range(5000)]
    chosen = [split.holds_out(name) for name in names]
    assert sum(chosen) / 5000 == pytest.approx(0.2, abs=0.03)
    first.close()
    again = opened(path)
    assert again.split(0.2) == split
    assert again.split(0.3).identity != split.identity
    assert HeldOutSplit(bytes(32), 0.2).identity != split.identity
    other = HeldOutSplit(bytes(32), 0.2)
    assert [other.holds_out(name) for name in names] != chosen
    grown = again.split(0.3)
    assert all(grown.holds_out(n) for n, held in zip(names, chosen, strict=True) if held)
    assert split.key.hex() not in json.dumps([dict(row.body) for row in again.history()])
    again.close()


def test_adding_a_patient_moves_nobody_else_between_the_parts():
    """Parallel composition needs this. Control: a split by position moves others."""
    split = HeldOutSplit(b"k" * 32, 0.25)
    names = [f"p{number:03d}" for number in range(200)]
    held = {name for name in names if split.holds_out(name)}
    more = ["p000a", *names]
    assert {name for name in more if split.holds_out(name)} - {"p000a"} == held
    by_position = {name for index, name in enumerate(sorted(names)) if index % 4 == 0}
    moved = {name for index, name in enumerate(sorted(more)) if index % 4 == 0}
    assert moved - {"p000a"} != by_position
