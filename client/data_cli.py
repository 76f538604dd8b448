"""The hospital's verbs about its records; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.data.intake import Names, System, receive, receive_cases, table_columns
from common.cli import Command, CommandError, emit_json, say, table
from common.errors import Code
from common.tasks.custom import CustomTask
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.imaging import ImagingTask
from common.tasks.tabular import TabularTask

if TYPE_CHECKING:
    from client.data.profile import Profile
    from client.data.records import Record
    from common.study import Study

DEFAULT_CONFIG: Final = Path("site.yaml")
_FAILED: Final = 1
_TOO_MANY: Final = "records of a patient beyond what the study takes"
_ROWS_OF_A_TABLE: Final = (DiagnosisTask, TabularTask, ImagingTask, CustomTask)
"""Tasks whose records are rows of one table: what is wrong in a row is counted, and goes on."""


def _configure_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path, help="study.yaml, or a bundle folder")
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="CSV, NDJSON or Parquet; without: the files of --config, of the study's simulation, "
        "or of site.yaml here",
    )
    parser.add_argument("--config", type=Path, default=None, help="the hospital's site.yaml")
    parser.add_argument("--patient", default=None, help="own name of the patient's column")
    parser.add_argument("--text", default=None, help="own name of the notes' column")
    parser.add_argument("--label", default=None, help="own name of the label's column")


def _check(arguments: argparse.Namespace) -> int:
    from client.data.profile import (
        profile_records,
        profile_tables,
        schema_of,
        schema_of_cases,
        tokenizer_of,
    )

    study = _study(arguments.study)
    source = _source(arguments, study)
    names = Names(
        arguments.patient or source.names.patient,
        arguments.text or source.names.text,
        arguments.label or source.names.label,
    )
    source = replace(source, names=names)
    tokens = None if study.model is None else tokenizer_of(study.model.backbone)
    left_out: Counter[str] = Counter()
    with _progress(quiet=arguments.json) as tick:
        in_tables = source.system is None and not _several(study)
        if in_tables and isinstance(study.task, _ROWS_OF_A_TABLE):
            columns = table_columns(study.task, names=names, site=source.site)
            found = profile_tables(
                source.files, columns, schema_of(study), tokens=tokens, tick=tick
            )
        else:
            records = _as_trained(study, source, left_out)
            rules = None if source.system is None else study.cases
            schema = schema_of(study) if rules is None else schema_of_cases(rules)
            found = profile_records(records, schema, tokens=tokens, tick=tick, left_out=left_out)
    if arguments.json:
        emit_json(
            {"study": study.name, "files": [str(file) for file in source.files], **found.to_json()}
        )
    else:
        _say(found)
        say(f"next: {_next(arguments, found)}")
    return 0 if found.usable else _FAILED


def _configure_unpack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="FILE.npz", help="an archive of MedMNIST")
    parser.add_argument("folder", type=Path, help="the folder to write; must not exist")
    parser.add_argument(
        "--labels",
        default=None,
        metavar="A,B,...",
        help="names of the labels 0, 1, ...; without: the numbers themselves",
    )


def _unpack(arguments: argparse.Namespace) -> int:
    from client.data.images import unpack_medmnist

    labels = None if arguments.labels is None else tuple(arguments.labels.split(","))
    counts = unpack_medmnist(arguments.archive, arguments.folder, labels)
    if arguments.json:
        emit_json({"folder": str(arguments.folder), "images": counts})
        return 0
    for part, count in counts.items():
        say(f"{arguments.folder / part}.csv: {count} images")
    say("next: name these tables in a study with task.kind: imaging, then wardround check STUDY")
    return 0


def _study(path: Path) -> Study:
    from common.bundle import STUDY_FILE, Bundle
    from common.config import load
    from common.study import Study

    if (path / STUDY_FILE).is_file():
        return Bundle.load(path).study
    return load(path, Study)


@dataclass(frozen=True)
class _Source:
    """The files, this hospital's own names of columns, and the column that names a site."""

    files: list[Path]
    names: Names = Names()  # noqa: RUF009 - frozen
    site: str | None = None
    system: System | None = None


def _source(arguments: argparse.Namespace, study: Study) -> _Source:
    if arguments.files:
        return _Source(list(arguments.files))
    config = arguments.config
    simulation = study.simulation
    if config is None and simulation is not None:
        folder = arguments.study.parent
        if simulation.data.system is not None:
            return _Source([], system=System.of(simulation.data.system, arguments.study))
        names = (*simulation.data.files, *simulation.data.test_files)
        files = [(folder / name).resolve() for name in names]
        return _Source(list(dict.fromkeys(files)), site=simulation.split.column)
    if config is None and not DEFAULT_CONFIG.exists():
        raise CommandError(
            Code.USAGE,
            "wardround client data check: there is no site.yaml here; name files, or --config.",
            remedy="Type `wardround client data check STUDY.yaml FILE`, or add --config site.yaml.",
        )
    from client.config import SiteConfig
    from client.local import local_files
    from common.config import load

    config = config or DEFAULT_CONFIG
    local = local_files(load(config, SiteConfig), config)
    return _Source(list(local.files), local.names, system=local.system)


def _several(study: Study) -> bool:
    """Whether a note's labels stand in one cell."""
    return study.task.kind == "diagnosis" and study.diagnosis.several


def _as_trained(study: Study, source: _Source, left_out: Counter[str]) -> Iterator[Record]:
    """The records as training reads them; what it would refuse ends them. Raises DataError."""
    if source.system is not None:
        received = receive_cases(study, source.system)
    else:
        received = receive(study.task, source.files, names=source.names, site=source.site)
    left_out.update(received.tally)
    if received.dropped:
        left_out[_TOO_MANY] += sum(received.dropped.values())
    yield from received.records


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A running count on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = Progress(
        SpinnerColumn(),
        TextColumn("{task.completed:,.0f} records"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with shown:
        task = shown.add_task("", total=None)
        yield lambda count: shown.update(task, completed=count)


# -------------------------------------------------------------------------------- showing


def _say(found: Profile) -> None:
    say(f"records   {found.records}")
    say(f"patients  {found.patients}{f' at {found.sites} sites' if found.sites else ''}")
    if found.names:
        say(f"columns   {', '.join(found.names)}")
    _pairs("records of a patient", "patients", found.records_per_patient)
    _pairs("label", "patients", found.labels)
    if found.columns:
        say()
        rows = [
            (c.name, f"{c.low:g} to {c.high:g}", c.values, c.missing, c.below, c.above)
            for c in found.columns
        ]
        table(["number", "bounds", "values", "missing", "below", "above"], rows)
    if found.lengths:
        say()
        told = ", ".join(f"{length} in {share}" for share, length in found.lengths.items())
        say(f"at most {told} of the texts ({found.length_unit})")
        if found.longer:
            say(f"longer than the model reads: {found.longer}")
    say()
    say(f"records that come again: {found.duplicates}; alike under several ids: {found.shared}")
    _pairs("what looks personal in texts", "texts", found.personal)
    _pairs("left out", "count", found.left_out)
    say()
    faults = [fix.message for fix in found.fixes if fix.kind == "fault"]
    warnings = [fix.message for fix in found.fixes if fix.kind == "warning"]
    for title, messages in (("to put right", faults), ("to look at", warnings)):
        if messages:
            say(f"{len(messages)} {title}:")
            for message in messages:
                say(f"  {message}")
    if not found.fixes:
        say("nothing to put right")


def _pairs(first: str, second: str, pairs: Mapping[str, str]) -> None:
    if pairs:
        say()
        table([first, second], list(pairs.items()))


def _next(arguments: argparse.Namespace, found: Profile) -> str:
    if not found.usable:
        return "put it right, and check again"
    return (
        f"wardround check {arguments.study}"
        if arguments.study.is_file()
        else (f"wardround client review {arguments.study}")
    )


COMMANDS: Final = [
    Command(
        "client data check",
        "say what the records hold, and what in them does not fit a study",
        _configure_check,
        _check,
    ),
    Command(
        "client data unpack",
        "write an archive of images (MedMNIST) as tables and PNGs",
        _configure_unpack,
        _unpack,
    ),
]
