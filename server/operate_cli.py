"""The verbs of whoever operates a coordinator: run, status, resume, report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Command, emit_json, say, table

if TYPE_CHECKING:
    from server.deploy import RunFolder
    from server.report import Conclusion
    from server.watch import RunStatus

_WATCH_SECONDS = 1.0
_STALE_SECONDS = 15
_MINUTE, _HOUR = 60, 3600


def _config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=Path("coordinator.yaml"), help="coordinator.yaml"
    )


def _state(arguments: argparse.Namespace) -> Path:
    from common.config import load
    from server.config import CoordinatorConfig

    return load(arguments.config, CoordinatorConfig).state_folder(arguments.config)


# ---------------------------------------------------------------- run, resume


def _linger_argument(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument(
        "--linger",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="how long to wait, after the end, for hospitals that have not fetched the model",
    )


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a published bundle folder")
    _linger_argument(parser)


def _run(arguments: argparse.Namespace) -> int:
    from server.service import open_service

    with open_service(arguments.config) as service:
        folder = service.prepare(arguments.bundle)
        return _served(arguments, service.run(folder, linger=arguments.linger * _HOUR))


def _configure_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", default=None, help="name of a run; default: the newest")
    _linger_argument(parser)


def _resume(arguments: argparse.Namespace) -> int:
    from server.service import open_service

    folder = _chosen(_state(arguments), arguments.run)
    with open_service(arguments.config) as service:
        return _served(arguments, service.run(folder, linger=arguments.linger * _HOUR))


def _chosen(state: Path, name: str | None) -> RunFolder:
    """The run of that name, or the newest. Raises StorageError where there is none."""
    from common.errors import Code, StorageError
    from server.deploy import runs

    found = {folder.root.name: folder for folder in runs(state)}
    if not found:
        raise StorageError(
            Code.NOT_A_RUN,
            f"{state}: no run was started here.",
            remedy="Start one: wardround server run BUNDLE",
        )
    if name is None:
        return list(found.values())[-1]
    if name not in found:
        raise StorageError(
            Code.NOT_A_RUN,
            f"{state}: there is no run called {name}.",
            remedy=f"Runs here: {', '.join(found)}.",
        )
    return found[name]


def _served(arguments: argparse.Namespace, concluded: Conclusion | None) -> int:
    """Say how it ended; None: it was stopped, and goes on with `resume`."""
    if concluded is None:
        line = f"wardround server resume --config {arguments.config}"
        if arguments.json:
            emit_json({"stopped": True, "next": line})
        else:
            say("stopped; everything is kept.")
            say(f"next: {line}")
        return 0
    return _ended(arguments, concluded)


def _ended(arguments: argparse.Namespace, concluded: Conclusion) -> int:
    if arguments.json:
        emit_json(concluded.summary)
    else:
        for line in concluded.lines:
            say(line)
    return 0 if concluded.good else 1


# ---------------------------------------------------------------- status


def _configure_status(parser: argparse.ArgumentParser) -> None:
    _config_argument(parser)
    parser.add_argument("--watch", action="store_true", help="show it again every second")


def _status(arguments: argparse.Namespace) -> int:
    from server.watch import kept

    state = _state(arguments)
    if arguments.json:
        emit_json(kept(state).to_json())
        return 0
    if not (arguments.watch and sys.stdout.isatty()):
        _say_status(kept(state))
        return 0
    while True:
        sys.stdout.write("\x1b[2J\x1b[H")
        _say_status(kept(state))
        sys.stdout.flush()
        time.sleep(_WATCH_SECONDS)


def _say_status(status: RunStatus) -> None:
    from common.world import unix_seconds

    age = unix_seconds() - status.at
    told = "" if age < _STALE_SECONDS else f"  (the coordinator is not running: {_ago(age)} old)"
    say(f"study {status.study}  digest {status.digest[:16]}  run {status.run[:8]}{told}")
    say(
        f"round {status.round} ({status.kind} {status.turn} of {status.turns}), phase "
        f"{status.phase}; {status.completed} completed, {status.aborted} aborted"
        + (f", {status.rejected} models rolled back" if status.rejected else "")
    )
    say(_waits(status))
    if status.ends is not None:
        say(f"expected end: in about {_span(status.ends)}")
    columns = ["hospital", "state", "online", "last heard", "up", "down", "told"]
    rows = [
        [
            site.site,
            site.state,
            "yes" if site.online else "no",
            "never" if site.heard is None else _ago(site.heard),
            _bytes(site.bytes_up),
            _bytes(site.bytes_down),
            site.code or "-",
        ]
        for site in status.sites
    ]
    table(columns, rows)


def _waits(status: RunStatus) -> str:
    if status.phase == "done":
        return "the run is over"
    who = ", ".join(status.waiting_for) or "nobody"
    until = "" if status.deadline is None else f", for {_span(status.deadline)} at most"
    return f"waits for {who}{until}; quorum {status.quorum} of {len(status.sites)}"


def _span(seconds: float) -> str:
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:  # noqa: PLR2004 - the unit's own size
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


# ---------------------------------------------------------------- health


def _health(arguments: argparse.Namespace) -> int:
    from common.config import load
    from server.config import CoordinatorConfig
    from server.watch import serving

    port = load(arguments.config, CoordinatorConfig).admin.health
    fresh = serving(port)
    if arguments.json:
        emit_json({"serving": fresh})
    else:
        say("serving" if fresh else "not serving: no coordinator, or its loop has stopped")
    return 0 if fresh else 1


# ---------------------------------------------------------------- report


def _configure_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", default=None, help="name of a run; default: the newest")
    _config_argument(parser)


def _report(arguments: argparse.Namespace) -> int:
    from common.errors import Code, StorageError
    from server.report import Conclusion

    folder = _chosen(_state(arguments), arguments.run)
    if not folder.conclusion.exists():
        raise StorageError(
            Code.RUN_UNFINISHED,
            f"{folder.root.name}: this run is not over.",
            remedy=f"Go on with it: wardround server resume --config {arguments.config}",
        )
    return _ended(arguments, Conclusion.from_json(json.loads(folder.conclusion.read_text())))


def _resume_line(arguments: argparse.Namespace) -> str:
    return f"wardround server resume --config {arguments.config}"


COMMANDS = [
    Command(
        "server run", "run a published study with its hospitals", _configure_run, _run, _resume_line
    ),
    Command(
        "server status",
        "who is online, what a run waits for and until when",
        _configure_status,
        _status,
    ),
    Command(
        "server resume", "go on with a run after any stop", _configure_resume, _resume, _resume_line
    ),
    Command("server health", "whether a run's loop is alive here", _config_argument, _health),
    Command("server report", "say again how a run ended", _configure_report, _report),
]
