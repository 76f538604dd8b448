"""The verbs of the coordinator's package and of simulation; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Command, emit_json, say, warn

if TYPE_CHECKING:
    from server.report import RunResult
    from server.simulate import Outcome
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


def _simulate(arguments: argparse.Namespace) -> int:
    from common.config import load
    from common.study import Study

    study = load(arguments.study, Study)
    out = _free_folder(arguments.out, DEFAULT_OUT)
    arguments.out = out
    from server.simulate import simulate

    view = _view(arguments, f"simulation of {study.name}", study.training.rounds)
    outcome = simulate(arguments.study, out, view=view, device=arguments.device)
    return _conclude(arguments, outcome, view)


def _configure_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the output folder of an interrupted run")
    _device_argument(parser)


def _resume(arguments: argparse.Namespace) -> int:
    from server.simulate import resume, study_of

    study = study_of(arguments.folder)
    view = _view(arguments, f"resumed: {study.name}", study.training.rounds)
    outcome = resume(arguments.folder, view=view, device=arguments.device)
    return _conclude(arguments, outcome, view)


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    _out_arguments(parser)


def _demo(arguments: argparse.Namespace) -> int:
    out = _free_folder(arguments.out, "wardround-demo")
    arguments.out = out
    from server.simulate import prepare_demo, simulate

    config, study = prepare_demo(out)
    if not arguments.json:
        say("Five synthetic hospitals, one classifier, real masks, real differential privacy.")
        say("One hospital drops out in round 2; one crashes in round 3 and comes back.")
    view = _view(arguments, "wardround demo (synthetic notes)", study.training.rounds)
    outcome = simulate(config, out / "run", view=view, device=arguments.device)
    return _conclude(arguments, outcome, view)


def _resume_line(arguments: argparse.Namespace) -> str:
    folder = getattr(arguments, "folder", None) or arguments.out
    inner = folder / "run" if (folder / "run").is_dir() else folder
    return f"wardround resume {inner}"


def _conclude(arguments: argparse.Namespace, outcome: Outcome, view: RunView) -> int:
    result = outcome.result
    if arguments.json:
        emit_json(summary(outcome))
        return 0 if result.audit_verified and not result.plain_updates else 1
    from server.report import site_table

    for line in outcome.warnings:
        warn(f"note: {line}")
    say(site_table(result))
    for line in verdict(outcome):
        say(line)
    view.finish("done" if result.audit_verified else "the audit log does not verify")
    return 0 if result.audit_verified and not result.plain_updates else 1


def verdict(outcome: Outcome) -> list[str]:
    """What a run ends with: what was seen, verified, spent and reached, and what to type next."""
    result, folder = outcome.result, outcome.folder
    lines = [
        f"coordinator saw: {result.masked_updates} masked updates, {result.plain_updates} readable",
        f"audit logs: {'verified' if result.audit_verified else 'NOT VERIFIED'}",
        _budget_line(result),
    ]
    together, alone = _means(result)
    if together is not None and alone is not None:
        lines.append(
            f"accuracy, mean over hospitals: alone {alone:.3f} (no privacy needed), "
            f"together {together:.3f}"
        )
    verbs = (
        f"privacy {folder}",
        f"audit verify {folder}",
        f"predict {folder / 'model'} FILE",
    )
    return [
        *lines,
        f"output: {folder}",
        "next: " + "   |   ".join(f"wardround {verb}" for verb in verbs),
    ]


def _budget_line(result: RunResult) -> str:
    spent = [(s.epsilon, s.cap) for s in result.sites if s.epsilon is not None]
    if not spent:
        return "budgets: none; this study has no differential privacy"
    held = all(cap is None or e <= cap + 1e-6 for e, cap in spent)
    most = max(e for e, _ in spent)
    return f"budgets: {'held' if held else 'EXCEEDED'}, largest epsilon {most:.3f}"


def _means(result: RunResult) -> tuple[float | None, float | None]:
    together = [s.together.accuracy for s in result.sites if s.together is not None]
    alone = [s.alone.accuracy for s in result.sites if s.alone is not None]
    if not together or not alone:
        return None, None
    return sum(together) / len(together), sum(alone) / len(alone)


def summary(outcome: Outcome) -> dict[str, Any]:
    """The one JSON object of `--json`."""
    from server.report import metrics_json

    result = outcome.result
    told = metrics_json(result)
    return {
        "rounds_completed": len(result.completed),
        "rounds_aborted": result.rounds_aborted,
        "final_metrics": told["final_metrics"],
        "epsilon": {
            s.site: {"spent": s.epsilon, "cap": s.cap, "delta": result.privacy.delta}
            for s in result.sites
        },
        "coordinator_saw": {
            "masked_updates": result.masked_updates,
            "plain_updates": result.plain_updates,
        },
        "audit_verified": result.audit_verified,
        "wall_seconds": result.wall_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "output": str(outcome.folder),
        "warnings": list(outcome.warnings),
    }


# ---------------------------------------------------------------- plan


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="a study.yaml, or the folder of a built bundle")
    parser.add_argument(
        "--parameters", type=int, default=None, help="trainable parameters, where no bundle is"
    )


def _plan(arguments: argparse.Namespace) -> int:
    from common.plan import plan, render

    if arguments.study.is_dir():
        from common.bundle import Bundle

        planned = Bundle.load(arguments.study).plan()
    else:
        from server.simulate import preview

        study, parameters, patients = preview(arguments.study, arguments.parameters)
        planned = plan(study, parameters, patients=patients)
    if arguments.json:
        emit_json(planned.to_json())
    else:
        say(render(planned))
        say(f"next: wardround simulate {arguments.study}")
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
