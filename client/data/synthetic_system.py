"""An invented hospital system in eICU's layout, for the example study. No real patient.

Who is old, has a high lactate or a creatinine that rises dies more often; five hospitals differ in
how ill their patients are, and one reports creatinine in umol/l. Some stays are too short, some
have no outcome, a few patients come twice. The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

__all__ = ["write_system"]

PATIENT: Final = (
    *("patientunitstayid", "patienthealthsystemstayid", "gender", "age", "hospitalid"),
    *("apacheadmissiondx", "hospitaldischargestatus", "unitdischargeoffset", "uniquepid"),
)
LAB: Final = (
    *("labid", "patientunitstayid", "labresultoffset", "labname", "labresult"),
    "labmeasurenamesystem",
)
# Hospitals: their number, and how ill their patients are.
_HOSPITALS: Final = ((101, 0.0), (102, 0.3), (103, -0.3), (104, 0.5), (105, 0.0))
_UMOL: Final = 103
_PER_MG: Final = 88.42
_PATIENTS: Final = 60
_SECOND: Final = 12  # every so many patients one comes again
_SHORT: Final = 15  # every so many stays end within the first day
_UNTOLD: Final = 20  # every so many have no outcome
_OLDEST: Final = 90
_NOT_MEASURED: Final = 0.15
_DAY: Final = 1440


def write_system(folder: Path, seed: int = 0) -> None:
    """Write patient.csv and lab.csv into a new folder."""
    folder.mkdir()
    stays: list[Sequence[object]] = []
    labs: list[Sequence[object]] = []
    for number, (hospital, ill) in enumerate(_HOSPITALS):
        stream = np.random.Generator(np.random.PCG64([seed, number]))
        for at in range(_PATIENTS):
            for visit in range(2 if at % _SECOND == 0 else 1):
                _stay(stays, labs, hospital, ill, f"{hospital:03d}-{at + 1}", visit, stream)
    for name, head, rows in (("patient", PATIENT, stays), ("lab", LAB, labs)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)


def _stay(
    stays: list[Sequence[object]],
    labs: list[Sequence[object]],
    hospital: int,
    ill: float,
    person: str,
    visit: int,
    stream: np.random.Generator,
) -> None:
    stay = 1000 + len(stays)
    age = int(stream.integers(30, 97))
    lactate = float(np.exp(stream.normal(0.6 + 0.3 * ill, 0.6)))
    creatinine = float(np.exp(stream.normal(0.1 + 0.2 * ill, 0.5)))
    rise = float(np.exp(stream.normal(0.0, 0.3)))
    logit = 0.06 * (age - 68) + 1.3 * math.log(lactate) + 2.0 * math.log(creatinine * rise) - 1.2
    died = stream.random() < 1 / (1 + math.exp(-logit))
    status = "" if stay % _UNTOLD == 0 else ("Expired" if died else "Alive")
    length = 600 if stay % _SHORT == 0 else int(stream.integers(_DAY + 60, 8 * _DAY))
    told = "> 89" if age >= _OLDEST else age
    sex = ("Female", "Male")[int(stream.integers(2))]
    stays.append((stay, stay, sex, told, hospital, "", status, length, person))
    for name, value, minute in (
        ("lactate", lactate, int(stream.integers(10, 300))),
        ("creatinine", creatinine, int(stream.integers(10, 300))),
        ("creatinine", creatinine * rise, int(stream.integers(700, _DAY))),
        # After the first day: a study that sees it knows more than it may.
        ("creatinine", 9.0 if died else 0.5, _DAY + 30 + visit),
    ):
        if name == "lactate" and stream.random() < _NOT_MEASURED:
            continue
        unit, factor = ("mmol/L" if name == "lactate" else "mg/dL"), 1.0
        if name == "creatinine" and hospital == _UMOL:
            unit, factor = "umol/L", _PER_MG
        labs.append((len(labs) + 1, stay, minute, name, f"{value * factor:.2f}", unit))
