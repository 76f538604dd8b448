"""Invented chest films of three invented hospitals, for the example study. No real patient.

A film is two dark lungs in a bright body; an opacity is a bright spot in one of them. Hospitals'
devices differ in brightness. The same seed gives the same pixels.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "LABELS", "SIZE", "films", "write_films"]

LABELS: Final = ("clear", "opacity")
COLUMNS: Final = ("patient", "hospital", "image", "label")
SIZE: Final = 16
# Hospitals, and how bright their devices show a body.
_HOSPITALS: Final = (("north", 150), ("east", 175), ("south", 200))
_PATIENTS: Final = 24
# Every so many patients one has a second film.
_SECOND: Final = 6
# Grays are rounded to steps of this, so that the files stay small.
_STEP: Final = 8

Film = tuple[str, str, str, str, NDArray[np.uint8]]


def films(seed: int = 0) -> list[Film]:
    """(patient, hospital, file, label, pixels) of every film."""
    found: list[Film] = []
    for number, (hospital, body) in enumerate(_HOSPITALS):
        stream = np.random.Generator(np.random.PCG64([seed, number]))
        for at in range(_PATIENTS):
            label = LABELS[at % 2]
            for film in range(2 if at % _SECOND == 0 else 1):
                patient = f"{hospital}-{at + 1:02d}"
                file = f"synthetic-films/{patient}{'ab'[film]}.png"
                found.append((patient, hospital, file, label, _film(label, body, stream)))
    return found


def _film(label: str, body: int, stream: np.random.Generator) -> NDArray[np.uint8]:
    down, right = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    shown = np.full((SIZE, SIZE), float(body))
    middles = []
    for left in (4.0, 11.0):
        middle = 7.5 + stream.uniform(-1, 1), left + stream.uniform(-0.5, 0.5)
        middles.append(middle)
        shown[((down - middle[0]) / 6) ** 2 + ((right - middle[1]) / 2.8) ** 2 < 1] = 0.3 * body
    if label == LABELS[1]:
        middle = middles[int(stream.integers(2))]
        below, beside = middle[0] + stream.uniform(-3, 3), middle[1] + stream.uniform(-0.5, 0.5)
        shown += 0.5 * body * np.exp(-((down - below) ** 2 + (right - beside) ** 2) / 4)
    shown += stream.normal(0, 8, shown.shape)
    grays: NDArray[np.uint8] = (np.clip(shown, 0, 255) // _STEP * _STEP).astype(np.uint8)
    return grays


def write_films(folder: Path, seed: int = 0) -> None:
    """Write synthetic-films.csv and a folder of PNGs beside it."""
    from PIL import Image

    (folder / "synthetic-films").mkdir(exist_ok=True)
    with (folder / "synthetic-films.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for patient, hospital, file, label, pixels in films(seed):
            Image.fromarray(pixels).save(folder / file, optimize=True)
            writer.writerow([patient, hospital, file, label])
