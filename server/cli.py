"""The verbs of the coordinator's package and of simulation; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Command, emit_json, say, table, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.report import Conclusion
    from server.table import RunView

DEFAULT_OUT = "wardround-out"


def _out_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=None, help="output folder (new or empty)")
    _device_argument(parser)


def _device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _free_folder(wanted: Path | None, stem: str) -> Path:
    """The folder asked for, or the first free `stem`, `stem-2`, ..."""
    if wanted is not None:
        return wanted
    number = 1
    while True:
        chosen = Path(stem if number == 1 else f"{stem}-{number}")
        if not chosen.exists():
            return chosen
        number += 1


def _view(arguments: argparse.Namespace, title: str, rounds: int) -> RunView:
    from server.table import LiveTable, PlainLines, Silent

    if arguments.json:
        return Silent()
    if not sys.stdout.isatty():
        return PlainLines(sys.stdout, rounds=rounds)
    from rich.console import Console

    return LiveTable(Console(), title=title, rounds=rounds)


# ---------------------------------------------------------------- simulate, resume, demo


def _configure_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="a study with a section `simulation`")
    _out_arguments(parser)
    parser.add_argument(
        "--no-alone",
        dest="compare",
        action="store_false",
        help="do not also train every hospital alone, for the comparison",
    )


def _simulate(arguments: argparse.Namespace) -> int:
    from common.config import load
    from common.study import Study

    study = load(arguments.study, Study)
    arguments.out = _free_folder(arguments.out, DEFAULT_OUT)
    from server.folder import Paths, require_room

    require_room(Paths(arguments.out), study, arguments.study)
    from server.simulate import simulate

    return _shown(
        arguments,
        _view(arguments, f"simulation of {study.name}", study.training.rounds),
        lambda view: simulate(
            arguments.study,
            arguments.out,
            view=view,
            device=arguments.device,
            compare=arguments.compare,
        ),
    )


def _configure_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the output folder of an interrupted run")
    _device_argument(parser)


def _resume(arguments: argparse.Namespace) -> int:
    from server.folder import Paths, study_of

    study = study_of(arguments.folder)
    if Paths(arguments.folder).conclusion.exists():
        return _again(arguments)
    from server.simulate import resume

    return _shown(
        arguments,
        _view(arguments, f"resumed: {study.name}", study.training.rounds),
        lambda view: resume(arguments.folder, view=view, device=arguments.device),
    )


def _again(arguments: argparse.Namespace) -> int:
    """A run that is over has nothing to go on with: it says its end once more."""
    from server.folder import Paths, kept_json
    from server.report import Conclusion

    concluded = Conclusion.from_json(kept_json(Paths(arguments.folder).conclusion))
    if not arguments.json:
        say(f"{arguments.folder}: this run is over; this is how it ended.")
        say()
    return _ended(arguments, concluded)


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    _out_arguments(parser)


def _demo(arguments: argparse.Namespace) -> int:
    arguments.out = _free_folder(arguments.out, "wardround-demo")
    from server.simulate import prepare_demo, simulate

    config, study = prepare_demo(arguments.out)
    if not arguments.json:
        say("Five synthetic hospitals, one classifier, real masks, real differential privacy.")
        say("One hospital drops out in round 2; one crashes in round 3 and comes back.")
    return _shown(
        arguments,
        _view(arguments, "wardround demo (synthetic notes)", study.training.rounds),
        lambda view: simulate(config, arguments.out, view=view, device=arguments.device),
    )


def _resume_line(arguments: argparse.Namespace) -> str:
    return f"wardround resume {getattr(arguments, 'folder', None) or arguments.out}"


def _shown(
    arguments: argparse.Namespace, view: RunView, work: Callable[[RunView], Conclusion]
) -> int:
    """Run `work` under a view, give the terminal back, and say how it ended."""
    try:
        concluded = work(view)
        view.finish("")
    finally:
        view.close()
    return _ended(arguments, concluded)


def _ended(arguments: argparse.Namespace, concluded: Conclusion) -> int:
    if arguments.json:
        emit_json(concluded.summary)
    else:
        _say_conclusion(concluded)
    return 0 if concluded.good else 1


def _say_conclusion(concluded: Conclusion) -> None:
    from server.report import SITE_COLUMNS

    for line in concluded.summary["warnings"]:
        warn(f"note: {line}")
    if concluded.rows:
        table(
            SITE_COLUMNS,
            concluded.rows,
            title="Accuracy by hospital, exact, with 95 % intervals (simulation only)",
        )
        say()
    for line in concluded.lines:
        say(line)


# ---------------------------------------------------------------- plan


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="a study.yaml, or the folder of a built bundle")
    parser.add_argument(
        "--parameters", type=int, default=None, help="trainable parameters, where no bundle is"
    )


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.study.is_dir():
        from common.bundle import Bundle
        from common.plan import render

        planned = Bundle.load(arguments.study).plan()
        following = "give the bundle to every hospital, to review and approve"
    else:
        from common.config import load
        from common.study import Study

        study = load(arguments.study, Study)
        simulated = study.simulation is not None
        parameters = arguments.parameters
        patients: dict[str, int] = {}
        if simulated or parameters is None:
            from server.simulate import preview

            study, parameters, patients = preview(study, arguments.study, parameters)
        from common.plan import plan, render

        planned = plan(study, parameters, patients=patients)
        verb = "simulate" if simulated else "study build"
        following = f"wardround {verb} {arguments.study}"
    if arguments.json:
        emit_json(planned.to_json())
    else:
        say(render(planned))
        say(f"next: {following}")
    return 0


# ---------------------------------------------------------------- audit verify


def _configure_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's output folder, or its audit folder")


def _audit(arguments: argparse.Namespace) -> int:
    from common.audit import run_audit_verify

    inner = arguments.folder / "audit"
    report = run_audit_verify(inner if inner.is_dir() else arguments.folder)
    if arguments.json:
        emit_json(report.to_json())
    else:
        for problem in report.problems:
            say(str(problem))
        say(report.verdict())
    return 0 if report.verified else 1


COMMANDS = [
    Command(
        "demo",
        "see a whole federation train, offline, in a minute",
        _configure_demo,
        _demo,
        _resume_line,
    ),
    Command(
        "simulate",
        "run a study on one machine, on your own files",
        _configure_simulate,
        _simulate,
        _resume_line,
    ),
    Command("resume", "go on with an interrupted run", _configure_resume, _resume, _resume_line),
    Command("plan", "what a study will do and cost, before anything runs", _configure_plan, _plan),
    Command("audit verify", "check a run's audit logs", _configure_audit, _audit),
]
