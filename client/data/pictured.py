"""A hospital's encounters with the images that its PACS keeps of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from client.data.encounters import Encounter, ImageEntry, Reader, Tally
from client.data.readers.dicom import DicomReader

__all__ = ["NO_DATE", "NO_STAY", "PicturedReader"]

NO_STAY: Final = "images that were taken in no stay of their patient"
NO_DATE: Final = "images without a date"


class PicturedReader:
    """Another reader's encounters, each with the images taken in it (`client.data.encounters`).

    An image belongs to a stay of the same patient where it was taken from the day on which the
    stay begins to the day on which it ends; a stay without those two has none.

    Args:
        reader: gives the encounters.
        folder: DICOM files, anywhere below; patients have the ids that `reader` gives them.

    Guarantee: memory holds a few words for each image; no pixel is read here.

    Raises:
        DataError: the folder is not there.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self._reader = reader
        self._images = DicomReader(folder)
        self._own = Tally()

    @property
    def tally(self) -> Tally:
        """What the reader left out, and which images are nobody's, by reason."""
        counts = self._reader.tally.counts + self._own.counts
        for reason, count in self._images.tally.counts.items():
            counts[f"files of the image folder: {reason}"] += count
        return Tally(counts)

    def encounters(self) -> Iterator[Encounter]:
        """Every encounter of the reader, in its order. Raises DataError."""
        waiting: dict[str, list[ImageEntry]] = defaultdict(list)
        for study in self._images.encounters():
            for image in study.images:
                if image.time is None:
                    self._own.add(NO_DATE)
                else:
                    waiting[study.patient].append(image)
        taken: set[Path] = set()
        for encounter in self._reader.encounters():
            found = tuple(i for i in waiting.get(encounter.patient, ()) if _within(encounter, i))
            taken.update(image.path for image in found)
            yield replace(encounter, images=found)
        nobodys = sum(i.path not in taken for images in waiting.values() for i in images)
        if nobodys:
            self._own.add(NO_STAY, nobodys)


def _within(encounter: Encounter, image: ImageEntry) -> bool:
    first, last, time = encounter.start, encounter.end, image.time
    if first is None or last is None or time is None:
        return False
    return first.date() <= time.date() <= last.date()
