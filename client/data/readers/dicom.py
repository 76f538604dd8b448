"""DICOM: pixels as a radiologist would see them, and folders of them as encounters.

Only the tags named here are read at all, so that no name, comment or report enters memory.

Source: DICOM PS3.3 C.7.6.3 (pixels), C.11.1 (rescale), C.11.2 (window).
"""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from client.data.encounters import Encounter, ImageEntry, Tally
from client.data.images import MAX_PIXELS, Pixels, checked, opened
from client.data.readers.cohort import age_in_years
from common.errors import Code, DataError

__all__ = ["DicomReader", "read_pixels"]

_PIXEL_TAGS: Final = (
    *("SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "BurnedInAnnotation"),
    *("PixelPaddingValue", "PixelData"),
)
_HEADER_TAGS: Final = (
    *("PatientID", "PatientAge", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
    *("StudyDate", "StudyTime", "AcquisitionDate", "AcquisitionTime", "InstanceNumber"),
    *("Rows", "Columns", "NumberOfFrames", "BurnedInAnnotation"),
)
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_SUFFIXES: Final = (".dcm", ".dicom")
_PREAMBLE: Final = 128
_MOST_FILES: Final = 1_000_000
_COLOURS: Final = 3
_WIDTHS: Final = (8, 16)
_SEX: Final = {"F": "female", "M": "male"}
_AGE: Final = re.compile(r"([0-9]{3})([DWMY])")
_YEARS: Final = {"D": 1 / 365.2425, "W": 7 / 365.2425, "M": 1 / 12, "Y": 1.0}
_DAYS_A_YEAR: Final = 365.2425
# What pydicom raises over a damaged file, beside its own InvalidDicomError (an Exception).
_BROKEN: Final = (
    *(OSError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError),
    *(NotImplementedError, RuntimeError, AssertionError, struct.error, zlib.error),
)

Values = NDArray[np.float64]


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Keep pydicom's words, which may quote a file's content, out of logs and errors."""
    from pydicom.errors import InvalidDicomError

    logger = logging.getLogger("pydicom")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (InvalidDicomError, *_BROKEN):
        raise DataError(Code.DATA_UNREADABLE, f"{path}: is damaged, or not a DICOM file.") from None
    finally:
        logger.disabled = before


def _read(path: Path, tags: tuple[str, ...], *, pixels: bool) -> Any:
    """The tags named, and nothing else. Raises DataError."""
    import pydicom
    from pydicom import filereader

    with opened(path) as file, _quiet(path):
        filereader.read_preamble(file, force=False)
        meta = filereader._read_file_meta_info(file)  # noqa: SLF001 - the public one reopens
        syntax = str(meta.get("TransferSyntaxUID", ""))
        file.seek(0)
        if syntax != _DEFLATED:
            return pydicom.dcmread(file, specific_tags=list(tags), stop_before_pixels=not pixels)
    # Its whole data set would be unpacked before a single size could be looked at.
    raise _kind(path, "is deflated as a whole, which is not read")


def _kind(path: Path, what: str) -> DataError:
    return DataError(Code.IMAGE_KIND, f"{path}: {what}.")


# ---------------------------------------------------------------------- pixels


def read_pixels(
    path: Path, *, window: tuple[float, float] | None = None, frame: int | None = None
) -> Pixels:
    """A DICOM image as bytes, bright where it is bright on a radiologist's screen.

    Args:
        path: the file.
        window: center and width of the rescaled values that are shown; None: the file's first
            window, and where it has none, from its least to its greatest value.
        frame: which of several, from 0; None: there must be one.

    Shapes: (H, W) uint8, or (H, W, 3) for colour.

    Raises:
        DataError: naming the file: no pixels, several frames, burned-in text, sizes or depths out
            of bounds, a compression that cannot be read here, damage.
    """
    header = _read(path, _PIXEL_TAGS, pixels=True)
    with _quiet(path):
        _refuse_text(header, path)
        layout = _Layout.of(header, path, frame)
        stored = _stored(header, path, layout)
        if layout.colour:
            return np.ascontiguousarray(stored.astype(np.uint8))
        return _shown(header, path, _signed(stored, layout), window)


def _refuse_text(header: Any, path: Path) -> None:
    """Refuse whatever does not deny burned-in text, where it says anything."""
    told = str(header.get("BurnedInAnnotation") or "").strip().upper()
    if told not in {"", "NO"}:
        raise DataError(Code.IMAGE_TEXT, f"{path}: has text burned into its pixels.")


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the pixels lie in the file, checked before any of them is unpacked."""

    frame: int
    colour: bool
    stored: int
    signed: bool

    @staticmethod
    def of(header: Any, path: Path, frame: int | None) -> _Layout:
        if "PixelData" not in header or not header.get("Rows") or not header.get("Columns"):
            raise _kind(path, "holds no pixels")
        frames = int(header.get("NumberOfFrames") or 1)
        if frame is None and frames != 1:
            raise _kind(path, f"holds {frames} frames, and none is named")
        if not 0 <= (frame or 0) < frames:
            raise _kind(path, f"has no frame {frame}")
        checked(int(header.Columns), int(header.Rows), str(path))
        if int(header.Columns) * int(header.Rows) * frames > MAX_PIXELS:
            raise _kind(path, f"has more than {MAX_PIXELS >> 20} million pixels in all frames")
        samples = int(header.get("SamplesPerPixel", 1))
        kind = str(header.get("PhotometricInterpretation", "")).strip()
        gray = samples == 1 and kind in {"MONOCHROME1", "MONOCHROME2"}
        if not gray and not (samples == _COLOURS and (kind == "RGB" or kind.startswith("YBR_"))):
            raise _kind(path, "is neither gray nor RGB")
        allocated, stored = int(header.BitsAllocated), int(header.BitsStored)
        depths = _WIDTHS if gray else _WIDTHS[:1]
        high = int(header.get("HighBit", stored - 1))
        whole = gray or stored == allocated
        if (
            allocated not in depths
            or not 0 < stored <= allocated
            or high != stored - 1
            or not whole
        ):
            raise _kind(path, f"stores {stored} of {allocated} bits in a way that is not read")
        signed = bool(int(header.get("PixelRepresentation", 0)))
        return _Layout(frame or 0, not gray, stored, signed)


def _stored(header: Any, path: Path, layout: _Layout) -> NDArray[Any]:
    """The frame's numbers as they lie in the file; colours as RGB."""
    from pydicom.pixels.utils import pixel_array

    try:
        found: NDArray[Any] = pixel_array(header, index=layout.frame)
    except (NotImplementedError, RuntimeError):
        raise _kind(path, "is compressed in a way that cannot be read here") from None
    if found.shape[:2] != (int(header.Rows), int(header.Columns)):
        raise DataError(Code.DATA_UNREADABLE, f"{path}: has other pixels than it says.")
    return found


def _signed(stored: NDArray[Any], layout: _Layout) -> NDArray[np.int32]:
    """The numbers without what old overlays left in the unused high bits."""
    values = stored.astype(np.int32) & ((1 << layout.stored) - 1)
    if layout.signed:
        sign = 1 << (layout.stored - 1)
        values = (values ^ sign) - sign
    return values


def _shown(
    header: Any, path: Path, stored: NDArray[np.int32], window: tuple[float, float] | None
) -> Pixels:
    """Rescaled, windowed, and turned round where black is high."""
    if header.get("ModalityLUTSequence"):
        raise _kind(path, "rescales by a table, which is not read")
    slope, intercept = _first(header, "RescaleSlope", 1.0), _first(header, "RescaleIntercept", 0.0)
    if not slope or not math.isfinite(slope) or not math.isfinite(intercept):
        raise _kind(path, "rescales by numbers that are not finite, or by 0")
    values = stored.astype(np.float64) * slope + intercept
    told = window or _own_window(header)
    if told is None:
        shown = _by_range(values, stored, header)
    elif not all(math.isfinite(number) for number in told) or told[1] <= 0:
        raise _kind(path, "names a window that is not finite, or not wider than 0")
    else:
        function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
        shown = _by_window(values, *told, function="LINEAR" if window else function)
    found = np.rint(shown * 255.0).astype(np.uint8)
    inverted = str(header.PhotometricInterpretation).strip() == "MONOCHROME1"
    return 255 - found if inverted else found


def _first(header: Any, name: str, default: float) -> float:
    """A tag's first number."""
    value = header.get(name)
    if value is None or value == "":
        return default
    return float(value if isinstance(value, int | float | str) else value[0])


def _own_window(header: Any) -> tuple[float, float] | None:
    center = _first(header, "WindowCenter", math.nan)
    width = _first(header, "WindowWidth", math.nan)
    return None if math.isnan(center) and math.isnan(width) else (center, width)


def _by_window(values: Values, center: float, width: float, *, function: str) -> Values:
    """From 0 to 1 within the window (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -50, 50))))
    if function != "LINEAR_EXACT":
        center, width = center - 0.5, max(width - 1.0, 1e-9)
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _by_range(values: Values, stored: NDArray[np.int32], header: Any) -> Values:
    """From 0 to 1 between the image's own extremes, padding left out."""
    padding = header.get("PixelPaddingValue")
    real = np.ones(stored.shape, bool) if padding is None else stored != int(padding)
    if not real.any():
        return np.zeros(values.shape)
    low, high = float(values[real].min()), float(values[real].max())
    return np.clip((values - low) / ((high - low) or 1.0), 0.0, 1.0)


# ---------------------------------------------------------------------- folders


@dataclass(slots=True)
class _Study:
    """One study as its files are read; a patient may have several."""

    patient: str
    start: datetime | None
    age: float | None
    sex: str | None
    images: list[tuple[int, str, ImageEntry]] = field(default_factory=list)


class DicomReader:
    """A folder of DICOM files, searched to its bottom: one encounter a study.

    Only headers are read; what of them is kept is the patient's id, age and sex, the study's id
    and date, and where the images lie. Other files, links, files without pixels, with burned-in
    text or with several frames are left out and counted.

    Raises:
        DataError: the folder is not there.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(Code.DATA_UNREADABLE, f"{root}: is not a folder.")
        self._root = root
        self._tally = Tally()

    @property
    def tally(self) -> Tally:
        """What was left out, by reason."""
        return self._tally

    def encounters(self) -> Iterator[Encounter]:
        """Every study with images, in the order of the files' paths.

        Guarantee: memory holds a few words for each image, and one file at a time.

        Raises:
            DataError: a file that is DICOM by its name is damaged, or there is no image at all.
        """
        studies: dict[tuple[str, str], _Study] = {}
        for path in self._paths():
            self._take(path, studies)
        if not studies:
            raise DataError(Code.DATA_EMPTY, f"{self._root}: holds no DICOM image that is read.")
        for (patient, number), study in studies.items():
            found = sorted(study.images, key=lambda image: image[:2])
            yield Encounter(
                patient=patient,
                encounter=number,
                site=None,
                start=study.start,
                end=None,
                age=study.age,
                sex=study.sex,
                died=None,
                file=str(found[0][2].path),
                line=1,
                images=tuple(entry for *_, entry in found),
            )

    def _paths(self) -> Iterator[Path]:
        """The files that are DICOM by name or, without one, by their first bytes."""
        count = 0
        for folder, below, names in os.walk(self._root, followlinks=False):
            below.sort()
            self._tally.add(_LINK, sum((Path(folder) / name).is_symlink() for name in below))
            for name in sorted(names):
                path = Path(folder) / name
                count += 1
                if count > _MOST_FILES:
                    raise DataError(
                        Code.DATA_TOO_LONG, f"{self._root}: holds more than {_MOST_FILES} files."
                    )
                if path.is_symlink():
                    self._tally.add(_LINK)
                elif name.lower().endswith(_SUFFIXES) or (not path.suffix and _begins(path)):
                    yield path
                else:
                    self._tally.add("not a DICOM file")

    def _take(self, path: Path, studies: dict[tuple[str, str], _Study]) -> None:
        header = _read(path, _HEADER_TAGS, pixels=False)
        with _quiet(path):
            patient = str(header.get("PatientID") or "").strip()
            number = str(header.get("StudyInstanceUID") or "").strip()
            burned = str(header.get("BurnedInAnnotation") or "").strip().upper()
            for reason, holds in (
                ("without pixels", not header.get("Rows") or not header.get("Columns")),
                ("without a patient id", not patient),
                ("without a study id", not number),
                ("text burned into the pixels", burned not in {"", "NO"}),
                ("several frames", int(header.get("NumberOfFrames") or 1) != 1),
            ):
                if holds:
                    self._tally.add(reason)
                    return
            if not burned:
                self._tally.add("burned-in text neither stated nor denied (kept)")
            start = _moment(header, "Study")
            study = studies.setdefault(
                (patient, number),
                _Study(patient, start, _age(header, start), _sex(header)),
            )
            place = int(_first(header, "InstanceNumber", 0.0))
            time = _moment(header, "Acquisition") or start
            study.images.append((place, str(path), ImageEntry(path, time)))


_LINK: Final = "a link, not followed"


def _begins(path: Path) -> bool:
    """Whether a file begins as DICOM does."""
    try:
        with path.open("rb") as opened:
            return opened.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"
    except OSError:
        return False


def _sex(header: Any) -> str | None:
    return _SEX.get(str(header.get("PatientSex") or "").strip().upper())


def _moment(header: Any, name: str) -> datetime | None:
    """A date with its time, midnight where there is none; None where it is not one."""
    day = str(header.get(f"{name}Date") or "").strip()
    time = str(header.get(f"{name}Time") or "").strip().partition(".")[0]
    for text, form in ((day + time, "%Y%m%d%H%M%S"), (day, "%Y%m%d")):
        try:
            return datetime.strptime(text, form)  # noqa: DTZ007 - hospitals' local time
        except ValueError:
            continue
    return None


def _age(header: Any, start: datetime | None) -> float | None:
    """In years, as told or from the date of birth."""
    told = _AGE.fullmatch(str(header.get("PatientAge") or "").strip())
    if told is not None:
        return age_in_years(int(told[1]) * _YEARS[told[2]])
    text = str(header.get("PatientBirthDate") or "").strip()
    if start is None:
        return None
    try:
        birth = datetime.strptime(text, "%Y%m%d")  # noqa: DTZ007 - a day
    except ValueError:
        return None
    return age_in_years((start - birth).days / _DAYS_A_YEAR)
