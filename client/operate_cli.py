"""The verbs of whoever operates a hospital: from review and approval to status and logs.

Heavy imports happen in `run`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.cli import VERSION, Command, emit_json, say, table
from common.errors import RefusedError

if TYPE_CHECKING:
    from client.config import SiteConfig
    from client.folders import HospitalFolder

DEFAULT_CONFIG: Final = Path("site.yaml")
_POLL_S: Final = 0.5
# As long as the name of the study's folder.
_SHORT: Final = 16


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="default: site.yaml")


def _site(arguments: argparse.Namespace) -> SiteConfig:
    from client.config import SiteConfig
    from common.config import load

    return load(arguments.config, SiteConfig)


def _folder(arguments: argparse.Namespace, config: SiteConfig | None = None) -> HospitalFolder:
    from client.folders import HospitalFolder

    config = _site(arguments) if config is None else config
    return HospitalFolder(config.state_folder(arguments.config))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---------------------------------------------------------------- review, approve


def _configure_review(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the folder that the coordinator published")
    _config_argument(parser)
    parser.add_argument(
        "--megabits", type=float, default=None, help="this hospital's line, for the minutes"
    )


def _review(arguments: argparse.Namespace) -> int:
    from client.folders import NAME_DIGITS
    from client.review import render, review

    found = review(
        arguments.bundle, _site(arguments), arguments.config, megabits=arguments.megabits
    )
    if arguments.json:
        emit_json(found.to_json())
    else:
        say(render(found))
        if not found.objections:
            digest = found.digest.hex()[:NAME_DIGITS]
            say(
                f'next: wardround client approve {arguments.bundle} --by "YOUR NAME" '
                f"--digest {digest}"
            )
    return RefusedError.exit_status if found.objections else 0


def _configure_approve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="the folder that was reviewed")
    parser.add_argument("--by", required=True, help="who approves; goes into the signed record")
    parser.add_argument(
        "--digest",
        default="",
        help="first digits of the study's digest as the review showed it; refuses any other study",
    )
    _config_argument(parser)


def _approve(arguments: argparse.Namespace) -> int:
    from client.review import approve_study
    from common.world import unix_seconds

    approved, new = approve_study(
        arguments.bundle,
        _site(arguments),
        arguments.config,
        by=arguments.by,
        now=unix_seconds(),
        reviewed=arguments.digest.lower(),
    )
    approval = approved.approval
    told: dict[str, Any] = {
        "study": approved.bundle.study.name,
        "digest": approval.study.hex(),
        "code": approval.code.hex(),
        "roster": approval.roster.hex(),
        "by": approval.by,
        "at": approval.at,
        "epsilon": approval.epsilon,
        "new": new,
        "folder": str(approved.folder.root),
    }
    if arguments.json:
        emit_json(told)
        return 0
    how = "approved" if new else "was approved already"
    say(f"{told['study']} {how} by {approval.by}, {_moment(approval.at)}")
    say(f"study digest {told['digest']}")
    say(f"code digest  {told['code']}")
    say("next: wardround client run")
    return 0


# ---------------------------------------------------------------- withdraw


def _configure_withdraw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", help="a study's name, or the digest that `client status` shows")
    _config_argument(parser)


def _withdraw(arguments: argparse.Namespace) -> int:
    from client.folders import withdraw
    from common.world import unix_seconds

    folder = _folder(arguments)
    root = withdraw(folder, arguments.study, now=unix_seconds())
    settled = _settled(folder)
    if arguments.json:
        emit_json({"withdrawn": True, "folder": str(root), "budget_given_back": settled})
        return 0
    say(f"{arguments.study}: the approval is taken back; nothing more leaves for this study")
    if settled is None:
        say("the ledger cannot be used now; what was reserved is given back at the daemon's start")
    elif settled:
        say("what the study had reserved and not run is given back to the budget")
    say("what earlier rounds contributed is in the model and cannot be taken out")
    say("next: wardround client status")
    return 0


def _settled(folder: HospitalFolder) -> bool | None:
    """Whether a reservation was given back; None where the ledger cannot be used."""
    if not folder.ledger.exists():
        return False
    from client.budget import settle_unapproved
    from client.privacy.ledger import Ledger
    from common.errors import StorageError
    from common.world import WallClock

    try:
        ledger = Ledger.open_existing(folder.ledger, clock=WallClock())
        try:
            return settle_unapproved(ledger, folder) > 0
        finally:
            ledger.close()
    except StorageError:
        return None


# ---------------------------------------------------------------- run, stop, start


def _run(arguments: argparse.Namespace) -> int:
    from client.operate import operate

    operate(arguments.config)
    if arguments.json:
        emit_json({"stopped": True})
    return 0


def _switch(arguments: argparse.Namespace) -> Path:
    return _site(arguments).kill_switch_file(arguments.config)


def _stop(arguments: argparse.Namespace) -> int:
    from common.world import make_folder, write_durably

    switch = _switch(arguments)
    if not switch.exists():
        make_folder(switch.parent)
        write_durably(switch, [b"While this file exists, nothing is trained and nothing sent.\n"])
    if arguments.json:
        emit_json({"stopped": True, "kill_switch": str(switch)})
    else:
        say(f"stopped: {switch}")
        say("next: wardround client start, when the hospital may take part again")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    from common.errors import Code, StorageError

    switch = _switch(arguments)
    try:
        switch.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{switch}: cannot be removed ({error.strerror})."
        ) from None
    if arguments.json:
        emit_json({"stopped": False, "kill_switch": str(switch)})
    else:
        say("the kill switch is off: approved studies go on")
    return 0


# ---------------------------------------------------------------- status, health


def _status(arguments: argparse.Namespace) -> int:
    from client.folders import heartbeat_age
    from common.world import unix_seconds

    config = _site(arguments)
    folder, now = _folder(arguments, config), unix_seconds()
    daemon = _told(folder.status)
    told = {
        "site": config.site,
        "running": _running(folder),
        "stopped": config.kill_switch_file(arguments.config).exists(),
        "heartbeat_age_s": heartbeat_age(folder, now),
        "daemon": daemon,
        "version_warning": _version_warning(daemon),
        "ledger": _ledger(folder),
        "studies": list(_studies(folder)),
    }
    if arguments.json:
        emit_json(told)
    else:
        _say_status(told, now)
    return 0


def _running(folder: HospitalFolder) -> bool:
    """Whether a daemon holds the state folder; the kernel knows, whatever files say."""
    import fcntl

    try:
        with folder.lock.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _told(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _version_warning(daemon: Mapping[str, Any] | None) -> str:
    """What to say where the coordinator's release is too far from this one; else empty."""
    from common.skew import far_apart

    other = str(((daemon or {}).get("link") or {}).get("peer_version", ""))
    if not other or not far_apart(VERSION, other):
        return ""
    return (
        f"the coordinator runs wardround {other}, this hospital {VERSION}: more than one minor "
        "version apart; bring the older side up to date"
    )


def _ledger(folder: HospitalFolder) -> dict[str, Any] | None:
    if not folder.ledger.exists():
        return None
    from client.privacy.ledger import Ledger
    from common.world import WallClock

    ledger = Ledger.open_existing(folder.ledger, clock=WallClock())
    try:
        spent = ledger.spent()
    finally:
        ledger.close()
    return {
        "epsilon": spent.epsilon,
        "cap": spent.cap,
        "left": spent.left,
        "delta": spent.delta,
        "rows": spent.rows,
    }


def _studies(folder: HospitalFolder) -> Iterator[dict[str, Any]]:
    """What is approved, as the records say; the daemon itself checks every signature."""
    from client.approval import Approval
    from common.errors import WardroundError

    for study in folder.approved():
        try:
            approval = Approval.load(study.approval)
        except WardroundError as error:
            yield {"folder": study.root.name, "code": error.code.label}
            continue
        written = _told(study.bundle / "study.yaml") or {}
        yield {
            "folder": study.root.name,
            "name": written.get("name", ""),
            "digest": approval.study.hex(),
            "approved_by": approval.by,
            "approved_at": approval.at,
            "epsilon": approval.epsilon,
            "finished": study.model.exists(),
            "code": "",
        }


def _say_status(told: Mapping[str, Any], now: int) -> None:
    daemon = told["daemon"] or {}
    state = "running" if told["running"] else "not running (wardround client run)"
    say(f"{told['site']}: the daemon is {state}")
    if told["stopped"]:
        say("the kill switch is on: nothing is trained, nothing is sent (wardround client start)")
    age = told["heartbeat_age_s"]
    say("the coordinator was never heard" if age is None else f"coordinator heard {age} s ago")
    link = daemon.get("link") or {}
    if told["running"] and link.get("waiting_because"):
        say(f"waiting: {link['waiting_because']}")
    if told["version_warning"]:
        say(f"warning: {told['version_warning']}")
    for trainer in daemon.get("trainers", ()) if told["running"] else ():
        say(f"trainer: process {trainer['pid'] or '-'} for {str(trainer['study'])[:_SHORT]}")
    ledger = told["ledger"]
    if ledger is not None:
        say(
            f"ledger: epsilon {ledger['epsilon']:.3f} of {ledger['cap']:g} "
            f"at delta {ledger['delta']:g}"
        )
    progress = {study["study"]: study for study in daemon.get("studies", ())}
    rows = [_study_row(study, progress.get(study.get("digest"), {})) for study in told["studies"]]
    if rows:
        say()
        table(["study", "digest", "approved by", "round", "last event", "at", "state"], rows)
    else:
        say("no study is approved here (wardround client review BUNDLE)")
    written = daemon.get("at")
    if told["running"] and isinstance(written, int) and now - written > 60:  # noqa: PLR2004
        say(f"the daemon last wrote its status {now - written} s ago")


def _study_row(study: Mapping[str, Any], progress: Mapping[str, Any]) -> list[object]:
    if study["code"]:
        return [study["folder"], "-", "-", "-", "-", "-", study["code"]]
    state = "finished" if study["finished"] else progress.get("code") or "approved"
    at = progress.get("at")
    return [
        study["name"],
        study["digest"][:_SHORT],
        study["approved_by"],
        progress.get("round", "-"),
        progress.get("event", "-"),
        "-" if not at else _moment(at),
        state,
    ]


def _configure_health(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument(
        "--age",
        type=int,
        default=None,
        metavar="SECONDS",
        help="the oldest heartbeat that is fresh",
    )


def _health(arguments: argparse.Namespace) -> int:
    from client.folders import FRESH_SECONDS, heartbeat_age
    from common.world import unix_seconds

    most = FRESH_SECONDS if arguments.age is None else arguments.age
    age = heartbeat_age(_folder(arguments), unix_seconds())
    fresh = age is not None and age <= most
    if arguments.json:
        emit_json({"fresh": fresh, "heartbeat_age_s": age})
    else:
        say(f"heartbeat: {'none' if age is None else f'{age} s old'}")
    return 0 if fresh else 1


# ---------------------------------------------------------------- logs


def _configure_logs(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("-n", "--lines", type=int, default=40, help="how many of the last lines")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes")


def _logs(arguments: argparse.Namespace) -> int:
    path = _folder(arguments).log
    lines = deque(_lines(path), maxlen=max(0, arguments.lines))
    if arguments.json:
        emit_json({"log": str(path), "lines": [entry for entry in map(_entry, lines) if entry]})
        return 0
    for line in lines:
        say(_readable(line))
    if arguments.follow:
        for line in follow(path, lambda: time.sleep(_POLL_S)):
            say(_readable(line))
    return 0


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from (line for line in file if line.strip())
    except FileNotFoundError:
        return


def follow(path: Path, pause: Callable[[], None]) -> Iterator[str]:
    """What is appended to `path` from now on; a rotated file is followed, for ever."""
    at = path.stat().st_size if path.exists() else 0
    rest = ""
    while True:
        pause()
        if not path.exists():
            continue
        size = path.stat().st_size
        at = 0 if size < at else at
        with path.open(encoding="utf-8", errors="replace") as file:
            file.seek(at)
            rest += file.read()
            at = file.tell()
        *whole, rest = rest.split("\n")
        yield from (line for line in whole if line.strip())


def _entry(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _readable(line: str) -> str:
    entry = _entry(line)
    if entry is None:
        return line.rstrip("\n")
    when = str(entry.pop("timestamp", ""))[:19]
    level, event = str(entry.pop("level", "")), str(entry.pop("event", ""))
    rest = " ".join(f"{key}={value}" for key, value in sorted(entry.items()) if value is not None)
    return f"{when} {level:<7} {event}  {rest}".rstrip()


COMMANDS = [
    Command("client review", "what a study would do here", _configure_review, _review),
    Command("client approve", "approve a study, on record", _configure_approve, _approve),
    Command("client withdraw", "take an approval back", _configure_withdraw, _withdraw),
    Command(
        "client run",
        "take part in what is approved, until a signal",
        _config_argument,
        _run,
        lambda arguments: f"wardround client run --config {arguments.config}",
    ),
    Command("client stop", "turn the kill switch on: nothing leaves", _config_argument, _stop),
    Command("client start", "turn the kill switch off", _config_argument, _start),
    Command("client status", "how the hospital stands", _config_argument, _status),
    Command("client logs", "the daemon's log", _configure_logs, _logs),
    Command("client health", "whether the heartbeat is fresh", _configure_health, _health),
]
