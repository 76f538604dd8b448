"""The verb `explain`; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from client.cli import add_record_arguments
from common.cli import Command, CommandError, emit_json, say, warn
from common.errors import Code


def _configure(parser: argparse.ArgumentParser) -> None:
    add_record_arguments(parser, patient="a column to name the records by")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="an .html file, or a folder (default: FILE-explained.html)",
    )
    parser.add_argument("--limit", type=int, default=20, help="records to explain, from the first")
    parser.add_argument("--label", default=None, help="explain this label, not the likeliest")


def _explain(arguments: argparse.Namespace) -> int:
    from client.data.intake import Names
    from client.explain.run import MOST_RECORDS, explain

    if not 1 <= arguments.limit <= MOST_RECORDS:
        message = f"--limit must be 1 to {MOST_RECORDS} (got {arguments.limit})."
        raise CommandError(Code.USAGE, message)
    out = arguments.out or arguments.file.with_name(
        arguments.file.name.split(".")[0] + "-explained.html"
    )
    done = explain(
        arguments.model,
        [arguments.file, *arguments.beside],
        out,
        names=Names(patient=arguments.patient, text=arguments.text),
        knowledge=arguments.knowledge,
        label=arguments.label,
        limit=arguments.limit,
        device=arguments.device,
    )
    if arguments.json:
        emit_json(
            {
                "explained": done.records,
                "left_out": done.left_out,
                "output": str(done.page),
                "better_than_random": done.better,
                "mean_gain": done.gain,
                "incomplete": done.incomplete,
                "largest_gap": max(done.gaps, default=0.0),
            }
        )
        return 0
    say(f"{done.records} records explained in {done.page}; {done.left_out} of the file left out")
    say(f"faithful: {done.better} of {done.records} orders beat chance, mean gain {done.gain:.3f}")
    if done.incomplete:
        warn(f"{done.incomplete} records' attributions do not add up; the page says which")
    say("the page holds patients' data: it was sent nowhere, keep it in the hospital")
    return 0


COMMANDS = [
    Command(
        "explain", "show why a model answers as it does, on a private page", _configure, _explain
    )
]
