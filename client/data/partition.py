"""Divides one data set among sites, always whole patients, always the same for the same seed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.data.records import Record, by_patient
from client.data.tables import file_sha256
from common.errors import Code, DataError
from common.ids import is_site_id
from common.study import Split

__all__ = ["MIN_PATIENTS", "Partition", "manifest", "partition", "site_slug"]

MIN_PATIENTS: Final = 10
"""The floor: fewer patients at a site are neither trained nor measured well, nor hidden well."""

_TRIES: Final = 200
_SLUG_LENGTH: Final = 63
_NAMED: Final = 5

Groups = list[list[int]]


@dataclass(frozen=True)
class Partition:
    """Which patients and records (positions in the data set) each site holds.

    Guarantee: every record is at exactly one site, and all records of a patient at the same one.
    """

    records: dict[str, tuple[int, ...]]
    patients: dict[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def partition(
    records: Sequence[Record],
    split: Split,
    *,
    labels: Sequence[str],
    seed: int,
    sites: Sequence[str] = (),
    floor: int = MIN_PATIENTS,
) -> Partition:
    """Divide `records` as `split` says.

    Args:
        records: labelled, all from the study's labels.
        split: how; `by: column` needs records with sites.
        labels: the study's labels, in order.
        seed: of every random choice; has no effect with `by: column`.
        sites: the study's site ids. With `by: column` they must be the ids found in the data;
            with the others they name the sites. Empty: ids from the data, or site-01, ...
        floor: patients every site must have.

    Raises:
        DataError: a site below the floor, a patient at two sites, a site value that cannot be an
            id, or a split that cannot be made after a bounded number of tries.
    """
    groups = by_patient(records)
    patients = list(groups)
    if split.by == "column":
        chosen = _by_column(records, groups, sites)
    else:
        count = len(sites) or split.sites
        if count is None:
            message = "the split does not say among how many sites."
            raise DataError(Code.SPLIT_IMPOSSIBLE, message, remedy="Set simulation.split.sites.")
        names = tuple(sites) or tuple(f"site-{i:0{_width(count)}d}" for i in range(1, count + 1))
        if len(patients) < count * floor:
            message = f"{len(patients)} patients cannot give {count} sites {floor} patients each."
            raise DataError(Code.SPLIT_IMPOSSIBLE, message)
        classes = _classes(records, groups, labels)
        drawn = _draw(split, classes, len(labels), count, floor, seed)
        chosen = dict(zip(names, drawn, strict=True))
    _require_floor(chosen, floor)
    named = {site: tuple(patients[p] for p in sorted(members)) for site, members in chosen.items()}
    held = {site: tuple(at for p in ids for at in groups[p]) for site, ids in named.items()}
    return Partition(held, named, _warnings(records, held, labels))


def manifest(
    records: Sequence[Record], done: Partition, split: Split, *, seed: int, files: Sequence[Path]
) -> dict[str, Any]:
    """What was divided and how: inputs by SHA-256, settings, rows and patients by label and site.

    It tells counts of a site: it belongs to a simulation, whose data one user owns.

    Raises:
        DataError: a file can no longer be read.
    """
    return {
        "format": "wardround-partition/1",
        "inputs": [{"file": str(path), "sha256": file_sha256(path)} for path in files],
        "split": split.model_dump(exclude_none=True),
        "seed": seed,
        "rows": len(records),
        "sites": {site: _site_counts(records, done, site) for site in done.records},
        "warnings": list(done.warnings),
    }


def site_slug(value: str) -> str:
    """A site id from a hospital's name: "Klinik Süd, Haus 2" gives "klinik-sud-haus-2".

    Raises:
        ValueError: nothing of the name is left.
    """
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG_LENGTH].rstrip("-")
    if not is_site_id(slug):
        raise ValueError("no letter or digit is left")
    return slug


def _by_column(
    records: Sequence[Record], groups: Mapping[str, list[int]], sites: Sequence[str]
) -> dict[str, list[int]]:
    slugs = _slugs(records)
    found: dict[str, list[int]] = {}
    for index, positions in enumerate(groups.values()):
        first = records[positions[0]]
        for at in positions[1:]:
            if records[at].site != first.site:
                message = f"{records[at].where}: this patient is also at the site of {first.where}."
                raise DataError(Code.DATA_PATIENT_TWICE, message)
        found.setdefault(slugs[first.site or ""], []).append(index)
    if sites and set(sites) != set(found):
        absent = sorted(set(sites) - set(found)) or sorted(set(found) - set(sites))
        message = f"the sites of the study and of the data differ (for one, {absent[0]})."
        raise DataError(
            Code.SITE_NAME, message, remedy="List exactly the sites of the data, or none."
        )
    return {site: found[site] for site in sites or sorted(found)}


def _slugs(records: Sequence[Record]) -> dict[str, str]:
    slugs: dict[str, str] = {}
    taken: dict[str, str] = {}
    for record in records:
        value = record.site or ""
        if value in slugs:
            continue
        try:
            slug = site_slug(value)
        except ValueError:
            message = f"{record.where}: the site has no letter or digit in its name."
            raise DataError(Code.SITE_NAME, message) from None
        if slug in taken:
            message = f"{record.where}: two different site names both become {slug}."
            raise DataError(Code.SITE_NAME, message)
        slugs[value], taken[slug] = slug, value
    return slugs


def _classes(
    records: Sequence[Record], groups: Mapping[str, list[int]], labels: Sequence[str]
) -> NDArray[np.int64]:
    """Each patient's most frequent label; of equally frequent ones the study's first."""
    place = {label: index for index, label in enumerate(labels)}
    classes = []
    for positions in groups.values():
        counts = Counter(place[records[at].label or ""] for at in positions)
        classes.append(min(counts, key=lambda index: (-counts[index], index)))
    return np.asarray(classes, np.int64)


def _draw(
    split: Split, classes: NDArray[np.int64], labels: int, count: int, floor: int, seed: int
) -> Groups:
    stream = np.random.Generator(np.random.PCG64(seed))
    for _ in range(_TRIES):
        match split.by:
            case "dirichlet":
                drawn = _dirichlet(classes, labels, count, split.alpha or 1.0, stream)
            case "pathological":
                drawn = _pathological(classes, labels, count, split.classes_per_site or 1, stream)
            case "quantity":
                drawn = _by_shares(
                    len(classes), _shares(split.skew or "uniform", count), floor, stream
                )
            case _:
                drawn = _by_shares(len(classes), _shares("uniform", count), floor, stream)
        if min(len(members) for members in drawn) >= floor:
            return drawn
    message = f"no {split.by} split gave each of {count} sites {floor} patients in {_TRIES} tries."
    raise DataError(Code.SPLIT_IMPOSSIBLE, message)


def _dirichlet(
    classes: NDArray[np.int64], labels: int, count: int, alpha: float, stream: np.random.Generator
) -> Groups:
    """For each label, shares over the sites drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    drawn: Groups = [[] for _ in range(count)]
    for label in range(labels):
        members = stream.permutation(np.flatnonzero(classes == label))
        shares = stream.dirichlet(np.full(count, alpha))
        _deal(drawn, members, shares)
    return drawn


def _pathological(
    classes: NDArray[np.int64], labels: int, count: int, each: int, stream: np.random.Generator
) -> Groups:
    """`each` classes a site: classes go round, then a class's patients go evenly to its sites."""
    present = np.flatnonzero(np.bincount(classes, minlength=labels))
    if each > len(present) or each * count < len(present):
        message = (
            f"{count} sites with {each} classes each cannot hold the {len(present)} classes there "
            "are."
        )
        raise DataError(Code.SPLIT_IMPOSSIBLE, message)
    ring = stream.permutation(present)
    seats = [
        [int(ring[(site * each + k) % len(ring)]) for k in range(each)] for site in range(count)
    ]
    drawn: Groups = [[] for _ in range(count)]
    for label in present:
        holders = [site for site in range(count) if int(label) in seats[site]]
        members = stream.permutation(np.flatnonzero(classes == label))
        part: Groups = [[] for _ in holders]
        _deal(part, members, np.full(len(holders), 1 / len(holders)))
        for site, dealt in zip(holders, part, strict=True):
            drawn[site].extend(dealt)
    return drawn


def _shares(skew: str, count: int) -> NDArray[np.float64]:
    rank = np.arange(1, count + 1, dtype=np.float64)
    weight = {
        "uniform": np.ones(count),
        "linear": rank,
        "square": rank**2,
        "exponential": np.exp(rank - count),
    }[skew]
    shares: NDArray[np.float64] = weight / weight.sum()
    return shares


def _by_shares(
    total: int, shares: NDArray[np.float64], floor: int, stream: np.random.Generator
) -> Groups:
    """The floor for every site, and what is left by shares: a steep skew starves nobody."""
    members = stream.permutation(total)
    given = floor * len(shares)
    drawn: Groups = [members[site : given : len(shares)].tolist() for site in range(len(shares))]
    _deal(drawn, members[given:], shares)
    return drawn


def _deal(drawn: Groups, members: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    """Cut `members` at the cumulated shares; the last site takes what rounding leaves."""
    ends = np.rint(np.cumsum(shares) * len(members)).astype(np.int64)
    ends[-1] = len(members)
    start = 0
    for site, end in enumerate(ends):
        drawn[site].extend(members[start:end].tolist())
        start = max(start, int(end))


def _require_floor(chosen: Mapping[str, Sequence[int]], floor: int) -> None:
    for site, members in chosen.items():
        if len(members) < floor:
            message = f"site {site} has {len(members)} patients; the floor is {floor}."
            raise DataError(Code.SITE_TOO_SMALL, message)


def _warnings(
    records: Sequence[Record], held: Mapping[str, Sequence[int]], labels: Sequence[str]
) -> tuple[str, ...]:
    found = []
    for site, positions in held.items():
        present = {label for at in positions for label in (records[at].label, *records[at].labels)}
        absent = [label for label in labels if label not in present]
        if absent:
            named = ", ".join(absent[:_NAMED]) + (", ..." if len(absent) > _NAMED else "")
            found.append(f"site {site} has no record of {len(absent)} label(s): {named}.")
    return tuple(found)


def _site_counts(records: Sequence[Record], done: Partition, site: str) -> dict[str, Any]:
    rows = Counter(records[at].label or "" for at in done.records[site])
    patients = {(records[at].label or "", records[at].patient) for at in done.records[site]}
    by_label = Counter(label for label, _ in patients)
    return {
        "rows": len(done.records[site]),
        "patients": len(done.patients[site]),
        "rows_by_label": dict(sorted(rows.items())),
        "patients_by_label": dict(sorted(by_label.items())),
    }


def _width(count: int) -> int:
    return max(2, len(str(count)))
