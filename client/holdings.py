"""The records of a simulation, read and divided among its hospitals. No torch.

A fault in a file is told before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data.intake import Received, System, receive, receive_cases
from client.data.records import Record, require_disjoint
from common.errors import Code, ConfigError
from common.study import Simulation, Study

if TYPE_CHECKING:
    from client.data.partition import Partition

__all__ = ["Holdings", "read_holdings", "study_with_sites"]

BySite = dict[str, tuple[Record, ...]]


@dataclass(frozen=True)
class Holdings:
    """What every hospital of a simulation holds, and how it came to be divided.

    Attributes:
        records: by hospital.
        tests: the records of the study's test files by hospital; empty where it has none.
    """

    records: BySite
    tests: BySite
    warnings: tuple[str, ...]
    manifest: dict[str, Any]
    seed: int


def read_holdings(study: Study, config: Path) -> Holdings:
    """Read and divide a simulation's data; paths are relative to the folder of `config`.

    Raises:
        DataError: naming file and line. ConfigError: the study has no simulation.
    """
    simulation = _simulation(study)
    data = simulation.data
    files = _paths(data.files, config)
    tests = _paths(simulation.data.test_files, config)
    labels, split, seed = study.labels, simulation.split, simulation.seed
    if data.system is None:
        taken = receive(study.task, files, site=split.column, groups=data.groups)
    else:
        system = System.of(data.system, config)
        taken = receive_cases(study, system)
        files = system.inputs()
    records = taken.records
    tested = Received((), {})
    if tests:
        tested = receive(study.task, tests, site=split.column, groups=data.groups)
    held = tested.records
    require_disjoint(records, held)
    # The division needs numpy: the files come first.
    from client.data.partition import manifest, partition

    sites = tuple(site.id for site in study.sites)
    done = partition(records, split, labels=labels, seed=seed, sites=sites)
    testing: BySite = {}
    beyond = _beyond(done, taken)
    if held:
        names = tuple(done.records)
        parts = partition(held, split, labels=labels, seed=seed, sites=names, floor=1)
        testing = _at_sites(held, parts)
        beyond += _beyond(parts, tested)
    told = [f"{line} beyond what the study takes of one and not read." for line in beyond]
    verb = "left out" if data.system is None else "in the system"
    told += [f"{verb}: {count} {reason}." for reason, count in sorted(taken.tally.items())]
    return Holdings(
        records=_at_sites(records, done),
        tests=testing,
        warnings=(*done.warnings, *told),
        manifest={
            **manifest(records, done, split, seed=seed, files=[*files, *tests]),
            "records_not_read": sum(taken.dropped.values()) + sum(tested.dropped.values()),
        },
        seed=seed,
    )


def _beyond(done: Partition, taken: Received) -> list[str]:
    """For each site that has any: how many of its records are not read, and of whom."""
    told = []
    for site, patients in done.patients.items():
        counts = [taken.dropped[patient] for patient in patients if patient in taken.dropped]
        if counts:
            told.append(f"site {site}: {sum(counts)} record(s) of {len(counts)} patient(s) are")
    return told


def study_with_sites(study: Study, config: Path) -> Study:
    """The study with its sites: listed, or, in a simulation, as its data gives them.

    Raises DataError naming file and line.
    """
    if study.sites or study.simulation is None:
        return study
    sites = tuple(read_holdings(study, config).records)
    from common.bundle import with_sites

    return with_sites(study, sites)


def _simulation(study: Study) -> Simulation:
    if study.simulation is None:
        raise ConfigError(
            Code.NO_SIMULATION, f"The study {study.name} has no section `simulation`."
        )
    return study.simulation


def _paths(names: Sequence[str], config: Path) -> list[Path]:
    return [(config.parent / name).resolve() for name in names]


def _at_sites(records: Sequence[Record], done: Partition) -> dict[str, tuple[Record, ...]]:
    return {site: tuple(records[i] for i in rows) for site, rows in done.records.items()}
