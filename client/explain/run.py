"""What `wardround explain` does: records in, one private page out, nothing sent anywhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.data.intake import Names, receive_inputs
from client.data.records import Record
from client.data.tables import TableColumns, read_table
from client.predict import TASK_FILE
from common.errors import Code, DataError, StorageError

if TYPE_CHECKING:
    from client.explain.page import Explanation

__all__ = ["MOST_RECORDS", "PAGE_FILE", "Explained", "explain"]

MOST_RECORDS: Final = 500
"""Records on one page: a page is for reading, and each record takes seconds."""

PAGE_FILE: Final = "explanation.html"


@dataclass
class Explained:
    """What was done, without a word of any record.

    Units:
        better: records in which the attributions' order beat random orders. gain: by how much, on
            average (docs/EXPLAIN.md). incomplete: records whose attributions do not add up.
    """

    page: Path
    records: int = 0
    left_out: int = 0
    better: int = 0
    incomplete: int = 0
    gains: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """Mean over the records."""
        return sum(self.gains) / max(len(self.gains), 1)


def explain(
    model_folder: Path,
    files: Sequence[Path],
    out: Path,
    *,
    names: Names | None = None,
    knowledge: Path | None = None,
    label: str | None = None,
    limit: int = 20,
    device: str = "auto",
) -> Explained:
    """Explain the first `limit` records of some files on one page.

    Args:
        model_folder: a folder that training wrote (any folder with a sequence classifier works).
        files: as for `predict`, the one with the records first.
        out: an .html file, or a folder that gets one; no file is replaced, and the page appears
            whole or not at all.
        names: the column with the notes (another task's model names its own columns), and one to
            name the records by.
        knowledge: as for `predict`.
        label: the label to explain; absent: each record's likeliest.
        limit: 1 to `MOST_RECORDS`.
        device: auto, cpu or cuda[:N].

    Guarantee: only this user may read the page (0600); nothing is sent; the same bytes for the
        same input on the same machine.

    Raises:
        DataError: the folder is not a model that is explained, the file cannot be used, the model
            has no such label, the page is already there.
        StorageError: the page cannot be written.
    """
    if not 1 <= limit <= MOST_RECORDS:
        raise ValueError(f"limit must be 1 to {MOST_RECORDS}")
    target = out if out.suffix.lower() in {".html", ".htm"} else out / PAGE_FILE
    if os.path.lexists(target):
        raise DataError(Code.OUTPUT_EXISTS, f"{target}: is already there.")
    done = Explained(target)
    explained = _Explainer(model_folder, device, knowledge)
    names = names or Names()
    records = explained.read(files, names)
    done.left_out = max(0, len(records) - limit)
    named = names.patient is not None
    _write(target, _pieces(records[:limit], explained, done, label=label, named=named))
    return done


class _Explainer:
    """A saved model that explains records one by one."""

    def __init__(self, folder: Path, device: str, knowledge: Path | None = None) -> None:
        from client.explain.saved import RowsModel
        from client.explain.text import TextModel

        rows = (folder / TASK_FILE).is_file()
        self._rows = RowsModel(folder, device, knowledge) if rows else None
        self._text = TextModel(folder, device) if self._rows is None else None

    def read(self, files: Sequence[Path], names: Names) -> tuple[Record, ...]:
        """The records of files, as the model takes them. Raises DataError."""
        if self._rows is not None:
            return receive_inputs(self._rows.task, files, patient=names.patient)
        if len(files) > 1:
            message = f"{files[1]}: this model reads one file of notes."
            raise DataError(Code.DATA_FORMAT, message, remedy="Leave out --with.")
        return read_table(files[0], TableColumns(names.text or "text", names.patient), labels=None)

    def __call__(self, record: Record, label: str | None) -> Explanation:
        if self._text is not None:
            return self._text.explain(record.text, label)
        if self._rows is None:
            raise RuntimeError("a model is of one kind or of the other")
        return self._rows.explain(record, label)


def _pieces(
    records: Sequence[Record],
    explained: _Explainer,
    done: Explained,
    *,
    label: str | None,
    named: bool,
) -> Iterator[str]:
    from client.explain.page import Case, page

    def cases() -> Iterator[Case]:
        for record in records:
            found = explained(record, label)
            done.records += 1
            done.better += found.found.curve.gain > 0
            done.incomplete += not found.found.balance.complete
            done.gains.append(found.found.curve.gain)
            done.gaps.append(found.found.balance.gap)
            yield Case(record.line, record.patient if named else None, found)

    return page(cases())


def _write(target: Path, pieces: Iterator[str]) -> None:
    """Write a file beside `target` that only its owner may read, then rename it."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.lexists(target):  # somebody else was faster
            raise DataError(Code.OUTPUT_EXISTS, f"{target}: is already there.")
        temporary.replace(target)
    except OSError as error:
        raise _unwritable(target, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(target: Path, error: OSError) -> StorageError:
    reason = error.strerror or type(error).__name__
    return StorageError(Code.MODEL_OUTPUT, f"{target}: cannot be written ({reason}).")
