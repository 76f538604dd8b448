"""Reads pictures: PNG, JPEG and DICOM as bytes of one size, and MedMNIST's arrays.

A file is a stranger: its size is looked at before its pixels are unpacked, nothing in it is
guessed, no text in it is kept, and no message repeats what it says.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import stat
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from client.data.records import Record
from common.errors import Code, DataError, StorageError
from common.tasks.imaging import ImagingTask
from common.tasks.multimodal import ImageInput

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "MIN_SIDE",
    "SUFFIXES",
    "Look",
    "Pixels",
    "checked",
    "file_bytes",
    "fitted",
    "image_of",
    "image_path",
    "look_of",
    "opened",
    "read_image",
    "read_medmnist",
    "unpack_medmnist",
]

MAX_FILE_BYTES: Final = 256 * 1024 * 1024
MAX_PIXELS: Final = 64 * 1024 * 1024
MIN_SIDE: Final = 8
_COLOURS: Final = 3
_FORMATS: Final = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_DICOM: Final = (".dcm", ".dicom")
SUFFIXES: Final = (*_FORMATS, *_DICOM)
"""The names' ends, in lower case, that tell what a picture is."""
_OPAQUE: Final = 255
_MOST_LABELS: Final = 1000
_BROKEN: Final = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

Pixels = NDArray[np.uint8]
"""(H, W) gray, or (H, W, 3) colour."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a picture is brought before a model: public terms of the study.

    size: pixels of a side, after `fit`. channels: 1 gray, 3 colour. window: (center, width) of
    DICOM values that are shown; None takes the file's own.
    """

    size: int
    channels: Literal[1, 3]
    fit: Literal["pad", "crop", "stretch"] = "pad"
    window: tuple[float, float] | None = None


def look_of(task: ImagingTask | ImageInput) -> Look:
    """How a study's pictures are brought before its network."""
    window = None if task.window is None else (task.window.center, task.window.width)
    return Look(task.size, task.channels, task.fit, window)


# ---------------------------------------------------------------------- files


def image_path(folder: Path, name: str) -> Path:
    """The file that a table in `folder` names: within the folder, and no link on the way.

    Raises:
        DataError: the name leaves the folder, is a link, or ends in no known way.
    """
    parts = PurePosixPath(name).parts
    foreign = "\\" in name or "\0" in name or PurePosixPath(name).is_absolute()
    if not parts or foreign or ".." in parts:
        raise DataError(Code.IMAGE_PATH, f"{folder}: an image is named outside of this folder.")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise DataError(Code.IMAGE_PATH, f"{folder}: an image is named through a link.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            Code.IMAGE_KIND, f"{folder}: an image's name does not end in {', '.join(SUFFIXES)}."
        )
    return path


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file of at most MAX_FILE_BYTES, to be read. Raises DataError.

    Guarantee: no link is followed at its end, and nothing but a file is read, whatever it has
        become since it was named.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DataError(Code.IMAGE_PATH, f"{path}: is a link.") from None
        raise DataError(Code.DATA_UNREADABLE, f"{path}: {error.strerror}.") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(Code.DATA_UNREADABLE, f"{path}: is not a file.")
        if found.st_size > MAX_FILE_BYTES:
            raise _kind(str(path), f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        if not found.st_size:
            raise DataError(Code.DATA_UNREADABLE, f"{path}: is empty.")
        with os.fdopen(os.dup(handle), "rb") as file:
            yield file
    finally:
        os.close(handle)


def file_bytes(path: Path) -> bytes:
    """The content of what `opened` opens. Raises DataError."""
    with opened(path) as file:
        try:
            # One that grows while it is read ends here, and is then damaged.
            return file.read(MAX_FILE_BYTES)
        except OSError as error:
            raise DataError(Code.DATA_UNREADABLE, f"{path}: {error.strerror}.") from None


def image_of(folder: Path, name: str, look: Look, *, where: str) -> Pixels:
    """The picture that a table in `folder` names, as the model sees it.

    Args:
        folder: the table's.
        name: what its cell says.
        look: how the picture is brought before the model.
        where: the table's file and line, for messages.

    Shapes: as `read_image`.

    Raises:
        DataError: naming `where`, and the image's file where it lies in the folder.
    """
    try:
        return read_image(image_path(folder, name), look)
    except DataError as error:
        raise DataError(error.code, f"{where}: {error.message}") from None


def read_image(path: Path, look: Look) -> Pixels:
    """A picture as the model sees it.

    Shapes: (size, size) uint8, or (size, size, 3) where the look has colour.

    Raises:
        DataError: naming the file, for whatever cannot be used.
    """
    if path.suffix.lower() in _DICOM:
        from client.data.readers.dicom import read_pixels

        pixels = read_pixels(path, window=look.window)
    else:
        pixels = _decoded(path)
    return fitted(pixels, look, where=str(path))


# ---------------------------------------------------------------------- PNG and JPEG


def _decoded(path: Path) -> Pixels:
    expected = _FORMATS.get(path.suffix.lower())
    if expected is None:
        raise _kind(str(path), f"does not end in {', '.join(SUFFIXES)}")
    content = file_bytes(path)
    from PIL import Image, ImageOps

    with _quiet_pillow(path):
        image = Image.open(io.BytesIO(content), formats=(expected,))
        _check_header(image, path)
        image.load()
        return _levels(ImageOps.exif_transpose(image), path)


@contextmanager
def _quiet_pillow(path: Path) -> Iterator[None]:
    """Whatever Pillow finds wrong, as one of our errors, without its words."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many(str(path)) from None
    except _BROKEN:
        raise DataError(
            Code.DATA_UNREADABLE, f"{path}: is damaged, or not what its name says."
        ) from None


def _check_header(image: Image.Image, path: Path) -> None:
    """Refuse what is too large, or more than one picture, before pixels are unpacked."""
    checked(image.width, image.height, str(path))
    if getattr(image, "n_frames", 1) != 1 or getattr(image, "is_animated", False):
        raise _kind(str(path), "holds several pictures")


def checked(width: int, height: int, where: str) -> None:
    """Refuse sizes out of bounds. Raises DataError."""
    if width * height > MAX_PIXELS:
        raise _too_many(where)
    if min(width, height) < MIN_SIDE:
        raise _kind(where, f"has less than {MIN_SIDE} pixels on a side")


def _levels(image: Image.Image, path: Path) -> Pixels:
    """Gray or RGB bytes; an alpha channel must hide nothing."""
    if image.mode.startswith(("I", "F")):
        raise _kind(str(path), "has more than 8 bits a channel: which of them to show is not said")
    if "A" in image.getbands() or "transparency" in image.info:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if bool((alpha != _OPAQUE).any()):
            raise _kind(str(path), "is transparent in places")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "P":
        image = image.convert("RGB")
    if image.mode == "1":
        image = image.convert("L")
    if image.mode not in {"L", "RGB"}:
        raise _kind(str(path), "is neither gray nor RGB")
    return np.array(image, np.uint8)


def _kind(where: str, what: str) -> DataError:
    return DataError(Code.IMAGE_KIND, f"{where}: {what}.")


def _too_many(where: str) -> DataError:
    return _kind(where, f"has more than {MAX_PIXELS >> 20} million pixels")


# ---------------------------------------------------------------------- size and colour


def fitted(pixels: Pixels, look: Look, *, where: str) -> Pixels:
    """The picture in the look's colours and size; a picture that is so already, unchanged.

    Shapes: (H, W) or (H, W, 3) uint8 to (size, size) or (size, size, 3).
    Guarantee: the same bytes on every machine (Pillow resamples in whole numbers).

    Raises:
        DataError: it is in colour where gray is declared; differing channels are never mixed.
    """
    if pixels.dtype != np.uint8 or pixels.ndim not in {2, 3}:
        raise _kind(where, "is not made of bytes")
    if pixels.ndim == _COLOURS and pixels.shape[2] != _COLOURS:
        raise _kind(where, "is neither gray nor RGB")
    checked(pixels.shape[1], pixels.shape[0], where)
    if look.channels == 1 and pixels.ndim == _COLOURS:
        gray = pixels[:, :, 0]
        if bool((pixels != gray[:, :, None]).any()):
            raise _kind(where, "is in colour, and the study declares one channel")
        pixels = gray
    if look.channels == _COLOURS and pixels.ndim != _COLOURS:
        pixels = np.repeat(pixels[:, :, None], _COLOURS, axis=2)
    if pixels.shape[:2] == (look.size, look.size):
        return np.ascontiguousarray(pixels)
    return _resized(_squared(pixels, look.fit), look.size)


def _squared(pixels: Pixels, fit: str) -> Pixels:
    height, width = pixels.shape[:2]
    if height == width or fit == "stretch":
        return pixels
    side = min(height, width) if fit == "crop" else max(height, width)
    top, left = abs(height - side) // 2, abs(width - side) // 2
    if fit == "crop":
        return pixels[top : top + side, left : left + side]
    square = np.zeros((side, side, *pixels.shape[2:]), np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square


def _resized(pixels: Pixels, size: int) -> Pixels:
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR), np.uint8)


# ---------------------------------------------------------------------- MedMNIST


Part = Literal["train", "val", "test"]


def read_medmnist(path: Path, part: Part, labels: Sequence[str]) -> tuple[Record, ...]:
    """One part of a MedMNIST archive, every image a patient of its own.

    Args:
        path: the .npz file.
        part: which of its parts.
        labels: the study's labels, in the order of the archive's numbers.

    Raises:
        DataError: it is not such an archive, or a number has no label.

    Source: Yang et al., MedMNIST v2, Scientific Data 2023.
    """
    images = _array(path, f"{part}_images")
    numbers = _array(path, f"{part}_labels")
    if images.dtype != np.uint8 or images.ndim not in {3, 4} or not len(images):
        raise _kind(str(path), "holds no images of bytes in two dimensions")
    if numbers.shape != (len(images), 1) or numbers.dtype.kind not in "iu":
        raise DataError(Code.DATA_VALUE, f"{path}: has no single number as label of every image.")
    if not bool(((numbers >= 0) & (numbers < len(labels))).all()):
        raise DataError(Code.DATA_LABEL, f"{path}: has a number without a label in the study.")
    return tuple(
        Record(f"{part}-{at}", "", labels[int(number)], None, str(path), at + 1, image=image)
        for at, (image, number) in enumerate(zip(images, numbers[:, 0], strict=True))
    )


def unpack_medmnist(
    path: Path, folder: Path, labels: Sequence[str] | None = None
) -> dict[str, int]:
    """Write an archive as a hospital has its images: a table and a folder of PNGs for each part.

    Args:
        path: the .npz file.
        folder: must not exist; appears whole or not at all. It then holds train.csv, val.csv and
            test.csv, as far as the archive has these parts, with the columns patient, image and
            label, and the images below.
        labels: names of the labels 0, 1 and so on; None: the numbers are their names.

    Returns:
        images by part.

    Raises:
        DataError: it is not such an archive, a number has no label, or the folder is there.
        StorageError: the folder cannot be written.
    """
    if folder.exists():
        raise DataError(Code.OUTPUT_EXISTS, f"{folder}: is already there.")
    names = labels if labels is not None else [str(number) for number in range(_MOST_LABELS)]
    there = [part for part in get_args(Part) if _holds(path, f"{part}_images")]
    if not there:
        raise DataError(Code.DATA_COLUMNS, f"{path}: has no array train_images.")
    counts = {}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for part in there:
                counts[part] = _write_part(beside, part, read_medmnist(path, part, names))
            beside.chmod(0o755)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror})."
        raise StorageError(Code.MODEL_OUTPUT, message) from None
    return counts


def _write_part(folder: Path, part: str, records: Sequence[Record]) -> int:
    from PIL import Image

    (folder / part).mkdir()
    with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["patient", "image", "label"])
        for record in records:
            file = f"{part}/{record.patient}.png"
            Image.fromarray(np.asarray(record.image)).save(folder / file)
            writer.writerow([record.patient, file, record.label])
    return len(records)


def _holds(path: Path, name: str) -> bool:
    """Whether an archive has this array. Raises DataError where it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(file_bytes(path))) as archive:
            return f"{name}.npy" in archive.namelist()
    except (*_BROKEN, zipfile.BadZipFile, NotImplementedError):
        raise DataError(
            Code.DATA_UNREADABLE, f"{path}: is damaged, or not an archive of plain arrays."
        ) from None


def _array(path: Path, name: str) -> NDArray[Any]:
    """One array of an archive; an object inside is refused, since reading it would run code."""
    try:
        with zipfile.ZipFile(io.BytesIO(file_bytes(path))) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.file_size > MAX_FILE_BYTES:
                raise _kind(str(path), f"unpacks to more than {MAX_FILE_BYTES >> 20} MiB")
            with archive.open(member) as opened:
                content = opened.read(MAX_FILE_BYTES)
        found: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except KeyError:
        raise DataError(Code.DATA_COLUMNS, f"{path}: has no array {name}.") from None
    except (*_BROKEN, zipfile.BadZipFile, NotImplementedError, MemoryError):
        raise DataError(
            Code.DATA_UNREADABLE, f"{path}: is damaged, or not an archive of plain arrays."
        ) from None
    return found
