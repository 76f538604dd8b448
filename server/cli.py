"""The verbs of the coordinator's package and of simulation; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Command, CommandError, emit_json, say, table, warn
from common.errors import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.plan import CostModel
    from common.study import Study
    from server.records import Holdings
    from server.report import Conclusion
    from server.simulate import Engine
    from server.table import RunView

DEFAULT_OUT = "wardround-out"
_BYTES_PER_MEGABIT = 125_000


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


def _view(arguments: argparse.Namespace, title: str, study: Study) -> RunView:
    from common.metrics import TITLES, scoring_of
    from server.table import LiveTable, PlainLines, Silent

    if arguments.json:
        return Silent()
    rounds, score = study.training.rounds, TITLES[scoring_of(study).names[0]]
    if not sys.stdout.isatty():
        return PlainLines(sys.stdout, rounds=rounds, score=score)
    from rich.console import Console

    return LiveTable(Console(), title=title, rounds=rounds, score=score)


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
    parser.add_argument(
        "--engine",
        choices=("process", "ray"),
        default="process",
        help="where the hospitals run: all in this process, or each as an actor on Ray",
    )


def _simulate(arguments: argparse.Namespace) -> int:
    from common.config import load
    from common.study import Study

    study = load(arguments.study, Study)
    engine = _engine(arguments.device) if arguments.engine == "ray" else None
    arguments.out = _free_folder(arguments.out, DEFAULT_OUT)
    from server.folder import Paths, require_room

    require_room(Paths(arguments.out), study, arguments.study)
    holdings = _read(study, arguments.study)
    from server.simulate import simulate

    return _shown(
        arguments,
        _view(arguments, f"simulation of {study.name}", study),
        lambda view: simulate(
            arguments.study,
            arguments.out,
            view=view,
            device=arguments.device,
            compare=arguments.compare,
            engine=engine,
            holdings=holdings,
        ),
    )


def _read(study: Study, config: Path) -> Holdings:
    """A simulation's data first: a fault in them is told before anything heavy is loaded."""
    from server.records import read

    return read(study, config)


def _engine(device: str) -> Engine:
    """Ray, where it is installed; looked at before anything is read."""
    from server.ray import on_ray

    return on_ray(device)


def _configure_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the output folder of an interrupted run")
    _device_argument(parser)


def _resume(arguments: argparse.Namespace) -> int:
    from server.folder import Paths, origin, study_of

    study = study_of(arguments.folder)
    if Paths(arguments.folder).conclusion.exists():
        return _again(arguments)
    engine = _engine(arguments.device) if Paths(arguments.folder).on_ray.exists() else None
    holdings = _read(study, origin(Paths(arguments.folder))[0])
    from server.simulate import resume

    return _shown(
        arguments,
        _view(arguments, f"resumed: {study.name}", study),
        lambda view: resume(
            arguments.folder,
            view=view,
            device=arguments.device,
            engine=engine,
            holdings=holdings,
        ),
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
        _view(arguments, "wardround demo (synthetic notes)", study),
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
            title=f"By hospital: {concluded.summary['score']}, exact, with 95 % intervals "
            "(simulation only)",
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
    parser.add_argument(
        "--megabits", type=float, default=None, help="a hospital's line, for the seconds of a round"
    )


def _cost(arguments: argparse.Namespace) -> CostModel:
    from common.plan import CostModel

    if arguments.megabits is None:
        return CostModel()
    if not arguments.megabits > 0:
        raise CommandError(Code.USAGE, "wardround plan: --megabits must be more than 0.")
    return CostModel(link_bytes=arguments.megabits * _BYTES_PER_MEGABIT)


def _plan(arguments: argparse.Namespace) -> int:
    patients: dict[str, int]
    if arguments.study.is_dir():
        from common.bundle import Bundle

        bundle = Bundle.load(arguments.study)
        study, patients = bundle.study, {}
        planned = bundle.plan(cost=_cost(arguments))
        following = f"the coordinator publishes it: wardround server publish {arguments.study}"
    else:
        from common.config import load
        from common.study import Study

        study = load(arguments.study, Study)
        simulated = study.simulation is not None
        parameters = arguments.parameters
        patients, crowded, engine = {}, {}, ""
        if simulated or parameters is None:
            holdings = _read(study, arguments.study) if simulated else None
            from server.simulate import preview

            found = preview(study, arguments.study, parameters, holdings)
            study, parameters, patients = found.study, found.parameters, found.patients
            engine, crowded = found.engine, found.crowded
        from common.plan import plan

        planned = plan(
            study,
            parameters,
            patients=patients,
            cost=_cost(arguments),
            engine=engine,
            crowded=crowded,
        )
        verb = "simulate" if simulated else "study build"
        following = f"wardround {verb} {arguments.study}"
    from common.modes import compare, render_comparison
    from common.plan import render

    both = compare(study, planned, patients=patients, cost=_cost(arguments))
    if arguments.json:
        emit_json({**planned.to_json(), "modes": None if both is None else both.to_json()})
    else:
        say(render(planned))
        if both is not None:
            say(render_comparison(both))
        say(f"next: {following}")
    return 0


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
]
