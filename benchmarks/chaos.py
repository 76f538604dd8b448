"""kill -9 of everybody at random moments, again and again, and what it cost.

    python benchmarks/chaos.py [--kills 200] [--seed 1] [--sites 4] [--spawn] [--json FILE]

Federations of real processes (tests/processes/deployment), one after another, until so many
processes were killed. In each, somebody is killed at a random moment, stays away for a random time
and comes back, until twelve were killed or the run is over. In a third of the runs only the
coordinator is killed, in a third only hospitals, in a third everybody. A run is lost where it does
not end, or where one of these does not hold: every round of the study was completed; no hospital
paid for a round twice, or was summed in one that it did not pay; all audit logs verify and agree;
everybody holds the same model, bit for bit; it is what the recorded survivors' updates give when
they are added in the clear; and where only the coordinator was killed, nobody was ever missing and
the model is that of an undisturbed run.

Every update takes 0.3 s, so that kills meet hospitals in training as well.

Processes are forked from one that has imported everything, so that many kills take little time;
with --spawn every start is a real one, and the seconds to come back are those of an operator.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "processes" / "deployment")]

import numpy as np  # noqa: E402
from federation import (  # noqa: E402
    COORDINATOR,
    Federation,
    Zygote,
    ended,
    replayed,
    require_whole,
)
from kills import kill_at_random  # noqa: E402

from common.tensors import state_digest  # noqa: E402

GOALS = {COORDINATOR: 30.0, "hospital": 10.0}
EACH = 12
KINDS = ("coordinator", "hospitals", "everybody")


def undisturbed(root: Path, given: argparse.Namespace, zygote: Zygote | None) -> bytes:
    """The digest of the model of a run that nothing disturbs."""
    with Federation(
        root, sites=given.sites, rounds=given.rounds, seed=given.seed, zygote=zygote
    ) as fed:
        fed.start()
        ended(fed, seconds=900)
        require_whole(fed)
        return state_digest(fed.model())


def storm(
    root: Path, kind: str, kills: int, reference: bytes, given: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """One run under kills."""
    stream = more["stream"]
    with Federation(
        root,
        sites=given.sites,
        rounds=given.rounds,
        seed=given.seed,
        zygote=more["zygote"],
        options={"train_s": 0.3},
    ) as fed:
        everybody = [COORDINATOR, COORDINATOR, *fed.sites]
        victims = {"coordinator": [COORDINATOR], "hospitals": fed.sites}.get(kind, everybody)
        fed.start()
        row: dict[str, Any] = {"kind": kind, "kills": [], "problem": ""}
        try:
            kills_made = kill_at_random(
                fed, stream, kills=kills, victims=victims, between_s=2.0, down_s=1.0, seconds=120
            )
            row["kills"] = [asdict(kill) for kill in kills_made]
            told = ended(fed, seconds=900)
            row |= {key: told[key] for key in ("rounds_completed", "rounds_aborted")}
            require_whole(fed)
            model = state_digest(fed.model())
            assert model == state_digest(replayed(fed)), "not the replay of its survivors"
            assert kind != "coordinator" or model == reference, "not that of an undisturbed run"
        except AssertionError as error:
            row["problem"] = str(error)
        row["double_spent"] = sum(fed.ledger(site).double_spent for site in fed.sites)
        row["dropouts"] = sum(given.sites - len(names) for names in fed.survivors().values())
    return row


def show(rows: list[dict[str, Any]]) -> bool:
    """The table; whether all goals are met."""
    kills = [kill for row in rows for kill in row["kills"]]
    lost = [row for row in rows if row["problem"]]
    print(f"{'runs':36} {len(rows):6}  lost {len(lost)}")
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        done = sum(row.get("rounds_completed", 0) for row in own)
        print(
            f"  killing {kind:26} {len(own):6}  kills {sum(len(r['kills']) for r in own)}, rounds "
            f"completed {done}, aborted {sum(r.get('rounds_aborted', 0) for r in own)}, hospitals "
            f"missing {sum(r['dropouts'] for r in own)}"
        )
    print(f"{'kills':36} {len(kills):6}  {dict(Counter(k['phase'] or 'start' for k in kills))}")
    print(f"{'budgets spent twice':36} {sum(row['double_spent'] for row in rows):6}")
    met = not lost and not sum(row["double_spent"] for row in rows)
    for who, goal in GOALS.items():
        back = sorted(
            kill["back_s"]
            for kill in kills
            if kill["back_s"] is not None
            and (kill["victim"] == COORDINATOR) == (who == COORDINATOR)
        )
        if back:
            print(
                f"{f'{who} back after, s':36} median {back[len(back) // 2]:.2f}, most "
                f"{back[-1]:.2f} (goal {goal:g}; {len(back)} times)"
            )
            met &= back[-1] <= goal
    for row in lost:
        print(f"LOST ({row['kind']}): {row['problem'][:3000]}")
    print("goals met" if met else "goals MISSED")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20, help="of each run")
    parser.add_argument("--spawn", action="store_true", help="every start is a real one")
    parser.add_argument("--folder", type=Path, default=None, help="where everything is written")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=given.folder))
    zygote = None if given.spawn else Zygote()
    stream = np.random.default_rng(given.seed)
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    try:
        reference = undisturbed(root / "undisturbed", given, zygote)
        while (left := given.kills - sum(len(row["kills"]) for row in rows)) > 0:
            place = root / f"run-{len(rows)}"
            kind = KINDS[len(rows) % len(KINDS)]
            more = {"stream": stream, "zygote": zygote}
            rows.append(storm(place, kind, min(EACH, left), reference, given, **more))
            told = rows[-1]
            kills = len(told["kills"])
            print(f"run {len(rows)}: {kills} kills of {kind} {told['problem'][:80]}", flush=True)
            if not told["problem"]:
                shutil.rmtree(place)
            elif not given.folder:
                break
    finally:
        if zygote is not None:
            zygote.close()
    print(f"{time.monotonic() - start:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1))
    return 0 if show(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
