"""The verbs that both sides have: `check`, `errors` and `audit verify`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from common.cli import EXIT_STATUS, Command, CommandError, emit_json, say, warn
from common.errors import Code, ConfigError, WardroundError

if TYPE_CHECKING:
    from common.config import Document, Frozen, Problem
    from common.study import Study

__all__ = ["COMMANDS", "KINDS", "errors_markdown"]

# format: (what people call it, module, model). Modules are found by name: a role image has
# only its own side.
KINDS: Final[Mapping[str, tuple[str, str, str]]] = {
    "wardround-study/1": ("study", "common.study", "Study"),
    "wardround-site/1": ("site", "client.config", "SiteConfig"),
    "wardround-coordinator/1": ("coordinator", "server.config", "CoordinatorConfig"),
}

BLOCKS: Final[Mapping[str, str]] = {
    "10": "Configuration",
    "20": "Data",
    "21": "Models and tasks",
    "30": "Privacy and ledger",
    "31": "Approval and ceilings",
    "32": "Enrolment",
    "40": "Cryptography and encoding",
    "41": "Handshake",
    "42": "Rounds",
    "50": "Aborted rounds and runs",
    "60": "Storage",
    "70": "Command line and output",
    "80": "A coordinator's run",
    "81": "A hospital's link",
    "82": "A coordinator's listeners",
    "83": "Stock Flower and Ray",
}


# ---------------------------------------------------------------------------------- check


def _configure_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="study, site or coordinator YAML")
    parser.add_argument(
        "--schema",
        choices=[name for name, _, _ in KINDS.values()],
        help="print the JSON schema of a kind of file, for an editor, and stop",
    )


def _check(arguments: argparse.Namespace) -> int:
    if arguments.schema is not None:
        kind = next(kind for kind, entry in KINDS.items() if entry[0] == arguments.schema)
        say(json.dumps(_model(kind).model_json_schema(), indent=1))
        return 0
    if not arguments.files:
        raise CommandError(
            Code.USAGE,
            "wardround check: name at least one file.",
            remedy="Type `wardround check STUDY.yaml`; --schema study prints every key.",
        )
    results = [_check_one(path, quiet=arguments.json) for path in arguments.files]
    good = all(result["ok"] for result in results)
    if arguments.json:
        emit_json({"ok": good, "files": results})
    elif good and any(result["kind"] == "study" for result in results):
        study = next(result["file"] for result in results if result["kind"] == "study")
        say(f"Next: wardround plan {study}")
    return 0 if good else ConfigError.exit_status


def _check_one(path: str, *, quiet: bool) -> dict[str, Any]:
    """One file's verdict, shown and returned."""
    from common.config import ConfigFileError, read

    result: dict[str, Any] = {"file": path, "kind": None, "ok": False, "problems": []}
    try:
        document = read(path)
        kind = _kind(document)
        result["kind"] = KINDS[kind][0]
        config = document.validate(_model(kind))
        problems = list(_missing_files(document))
        if problems:
            raise ConfigFileError(Code.CONFIG_INVALID, problems)
    except WardroundError as error:
        result["code"] = error.code.label
        listed = error.problems if isinstance(error, ConfigFileError) else ()
        result["problems"] = [vars(problem) for problem in listed] or [{"message": error.message}]
        if not quiet:
            warn(error.report())
        return result
    result["ok"] = True
    notes = list(_notes(document))
    result["notes"] = [str(note) for note in notes]
    if not quiet:
        say(f"{path}: ok: {_summary(config)}")
        for note in notes:
            say(f"  note: {note}")
    return result


def _kind(document: Document) -> str:
    """The file's own word for what it is. Raises ConfigFileError."""
    from common.config import ConfigFileError

    kind = document.format
    if kind is not None and kind in KINDS:
        return kind
    known = ", ".join(KINDS)
    message = f"must be one of {known}" if "format" in document.data else f"is missing ({known})"
    problem = document.problem(("format",), message)
    raise ConfigFileError(Code.CONFIG_FORMAT, [problem])


def _model(kind: str) -> type[Frozen]:
    name, module, model = KINDS[kind]
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise CommandError(
            Code.NOT_INSTALLED,
            f"A {name} file is checked by the package {package}, which is not installed here.",
        )
    return cast("type[Frozen]", getattr(importlib.import_module(module), model))


def _summary(config: Frozen) -> str:
    """One line that a person compares with what was meant."""
    name = type(config).__name__
    if name == "Study":
        return _study_summary(cast("Study", config))
    if name == "SiteConfig":
        return f"site {config.site}"  # type: ignore[attr-defined]
    return "coordinator"


def _study_summary(study: Study) -> str:
    count = study.party_count
    parties = (
        "hospitals as the data says"
        if count is None
        else f"{count} hospitals, quorum {study.quorum_size(count)}"
    )
    privacy = study.privacy
    promise = (
        "no differential privacy"
        if privacy.mode == "none"
        else f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
    )
    return (
        f"study {study.name}: {_predicts(study)}, {_learns(study)}, "
        f"{study.training.rounds} rounds, {parties}, {promise}"
    )


def _learns(study: Study) -> str:
    """What learns, in a word or two: a backbone's tuning, or the shape of a perceptron."""
    backbone, tuning = study.architecture
    return backbone if study.model is None else tuning


def _predicts(study: Study) -> str:
    """What comes out, in a word or two."""
    count = len(study.labels)
    return f"{count} labels" if count else study.task.kind


def _file_keys(document: Document) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every key of a valid file that names an input file."""
    data: Any = document.data
    section = (data.get("simulation") or {}).get("data")
    prefix: tuple[str, ...] = ("simulation", "data")
    if document.format == "wardround-site/1":
        section, prefix = data["data"], ("data",)
    for key in ("files", "test_files"):
        for index, path in enumerate((section or {}).get(key, ())):
            yield (*prefix, key, index), path
    # Without a simulation the graph lies where each hospital's site.yaml says.
    graph = (data.get("task") or {}).get("graph") if section and "task" in data else None
    for index, path in enumerate((graph or {}).get("files", ())):
        yield ("task", "graph", "files", index), path


def _folder_keys(document: Document) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every key of a valid file that names an input folder."""
    data: Any = document.data
    if data.get("knowledge") is not None:
        yield ("knowledge",), data["knowledge"]
    prefix: tuple[str, ...] = ("data",)
    if document.format != "wardround-site/1":
        data, prefix = data.get("simulation") or {}, ("simulation", "data")
    system = (data.get("data") or {}).get("system")
    if system and "folder" in system:
        yield (*prefix, "system", "folder"), system["folder"]


def _missing_files(document: Document) -> Iterator[Problem]:
    from common.config import beside

    for loc, path in _file_keys(document):
        if not beside(document.name, path).is_file():
            yield document.problem(loc, f"no such file (looked for {_where(document, path)})")
    for loc, folder in _folder_keys(document):
        if not beside(document.name, folder).is_dir():
            looked = _where(document, folder)
            yield document.problem(loc, f"no such folder (looked for {looked})")


def _where(document: Document, path: str) -> str:
    from common.config import beside

    return str(beside(document.name, path))[:200]


def _notes(document: Document) -> Iterator[Problem]:
    """What is right here and may still be a surprise: a backbone that this machine lacks."""
    if document.format != "wardround-study/1":
        return
    if "model" not in document.data:
        return
    backbone = document.data["model"]["backbone"]
    loc = ("model", "backbone")
    if backbone.startswith("package:"):
        package = backbone.removeprefix("package:").partition("/")[0]
        if not package.isidentifier() or importlib.util.find_spec(package) is None:
            yield document.problem(loc, "this Python package is not installed here")
    elif backbone.startswith((".", "/", "~")):
        from common.config import beside

        if not beside(document.name, backbone).is_dir():
            yield document.problem(loc, "there is no such folder here")


# --------------------------------------------------------------------------------- errors


def _configure_errors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", metavar="CODE", help="such as WR-1004 or 1004")
    parser.add_argument("--markdown", action="store_true", help="print docs/ERRORS.md")


def _errors(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        say(errors_markdown().rstrip("\n"))
        return 0
    chosen = list(Code) if arguments.code is None else [_code(arguments.code)]
    if arguments.json:
        emit_json(
            {
                "errors": [
                    {"code": c.label, "name": c.name, "meaning": c.meaning, "remedy": c.remedy}
                    for c in chosen
                ]
            }
        )
    elif arguments.code is None:
        for code in sorted(chosen, key=lambda code: code.label):
            say(f"{code.label}  {code.meaning}")
    else:
        say(f"{chosen[0].label}: {chosen[0].meaning}\n  what to do: {chosen[0].remedy}")
    return 0


def _code(text: str) -> Code:
    label = text.upper() if text.upper().startswith("WR-") else f"WR-{text}"
    for code in Code:
        if code.label == label:
            return code
    raise CommandError(Code.UNKNOWN_CODE, f"There is no error {text[:20]!a}.")


def errors_markdown() -> str:
    """docs/ERRORS.md, from the codes alone."""
    lines = [
        "# Errors",
        "",
        "Every fault of a user or a peer has a stable code, one sentence and a remedy.",
        "A code may be retired; its number is never given to something else. `wardround errors",
        "WR-1004` explains one. This page is printed by `wardround errors --markdown`.",
        "",
        "## Exit status",
        "",
        "| status | meaning |",
        "|---|---|",
        *(f"| {status} | {meaning} |" for status, meaning in EXIT_STATUS.items()),
    ]
    codes = sorted(Code, key=lambda code: code.label)
    for block, title in BLOCKS.items():
        rows = [code for code in codes if code.label.startswith(f"WR-{block}")]
        if rows:
            lines += ["", f"## {title}", "", "| code | meaning | what to do |", "|---|---|---|"]
            lines += [f"| {c.label} | {_cell(c.meaning)} | {_cell(c.remedy)} |" for c in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --------------------------------------------------------------------------- audit verify


def _configure_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's output folder, or its audit folder")
    parser.add_argument(
        "others", type=Path, nargs="*", help="the same of other parties, to compare with"
    )


def _audit(arguments: argparse.Namespace) -> int:
    from common.audit import run_audit_verify

    report = run_audit_verify(arguments.folder, arguments.others)
    if arguments.json:
        emit_json(report.to_json())
    else:
        for problem in report.problems:
            say(str(problem))
        say(report.verdict())
    return 0 if report.verified else 1


COMMANDS: Final = [
    Command(
        "check", "say whether a file is right, and every line that is not", _configure_check, _check
    ),
    Command("audit verify", "check a run's audit logs", _configure_audit, _audit),
    Command("errors", "explain an error code, or list them all", _configure_errors, _errors),
]
