"""The operator's log: one JSON object per line, events and allowed keys only.

An event is a name (`round.masked_sent`), never a sentence, so that nothing a patient or a
third-party exception said can slip in. A key that is not on the list below is dropped; a
value that is not a number, a truth value or a plain token is dropped; a key that names a
secret shows as redacted. The audit log (`common.audit`) is evidence; this one is for looking.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, cast

import structlog

from common.errors import Code, StorageError, WardroundError

__all__ = ["ALLOWED", "DROPPED", "REDACTED", "Log", "open_log", "refined"]

DROPPED: Final = "<dropped>"
REDACTED: Final = "<redacted>"

ALLOWED: Final[frozenset[str]] = frozenset(
    {
        *("level", "timestamp", "event", "code", "error", "status", "verdict"),
        *("site", "sites", "role", "study", "run", "round", "phase", "step", "attempt"),
        *("cohort", "survivors", "dropouts", "quorum", "parties", "culprit"),
        *("bytes", "bytes_up", "bytes_down", "seconds", "deadline_s", "count", "size"),
        *("epsilon", "epsilon_cap", "delta", "noise_multiplier", "sampling_rate", "clip_norm"),
        *("model_digest", "study_digest", "roster_digest", "ledger_counter", "transcript"),
        *("version", "device", "precision", "threads", "lost_lines"),
    }
)
_SECRET: Final = re.compile(r"key|seed|secret|share|private|password|passphrase|token|nonce|mask$")
_EVENT: Final = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+")
_TOKEN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,127}")

Fields = MutableMapping[str, Any]
Log = structlog.typing.FilteringBoundLogger


def refined(fields: Fields, *, strict: bool) -> Fields:
    """`fields` with everything removed that a log may not hold.

    Guarantee: what is returned holds only allowed keys, numbers, truth values, tokens
    without spaces, and lists of these.

    Raises:
        ValueError: under `strict` (tests), instead of dropping; our own fault, a bug.
    """
    clean: Fields = {}
    for key, value in fields.items():
        if key == "event":
            allowed: object = value if _is_event(value) else DROPPED
        elif key not in ALLOWED:
            allowed = REDACTED if _SECRET.search(key) else DROPPED
        else:
            allowed = _plain(value)
        if strict and allowed is DROPPED:
            raise ValueError(f"a log may not hold the key {key!r}, or not such a value")
        # A key that is not on the list may itself be somebody's text: it goes, too.
        name = key if key in ALLOWED or allowed is REDACTED else "dropped"
        clean[name] = allowed
    return clean


def _is_event(value: object) -> bool:
    return isinstance(value, str) and _EVENT.fullmatch(value) is not None


def _plain(value: object) -> object:
    """A value a log may hold, or DROPPED."""
    if isinstance(value, Enum):
        value = value.label if isinstance(value, Code) else value.value
    elif isinstance(value, BaseException):
        value = value.code.label if isinstance(value, WardroundError) else type(value).__name__
    if isinstance(value, tuple | list | frozenset | set):
        return _plain_list(value)
    plain = value is None or isinstance(value, bool | int | float)
    token = isinstance(value, str) and _TOKEN.fullmatch(value) is not None
    return value if plain or token else DROPPED


def _plain_list(values: Iterable[object]) -> object:
    plain = [_plain(value) for value in values]
    return DROPPED if any(item is DROPPED for item in plain) else plain


class _Sink:
    """Appends lines to a file, opened for each line so that a rotated file is followed.

    A full disk loses log lines, never a round; the next line that fits says how many.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lost = 0

    def open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def msg(self, line: str) -> None:
        # The line break in front ends a line that the full disk may have cut short.
        lost = f'\n{{"event": "log.lines_lost", "lost_lines": {self._lost}}}\n'
        data = ((lost if self._lost else "") + line + "\n").encode()
        try:
            descriptor = self.open()
            try:
                whole = os.write(descriptor, data) == len(data)
            finally:
                os.close(descriptor)
        except OSError:
            whole = False
        self._lost = 0 if whole else self._lost + 1

    debug = info = warning = error = critical = msg


def open_log(path: str | Path, *, level: str = "info", strict: bool = False) -> Log:
    """A log that appends to `path` (created with mode 0600; its folder must exist).

    Args:
        path: the file.
        level: debug, info, warning or error.
        strict: raise on a key or value that would be dropped; for tests.

    Raises:
        StorageError: LOG_OPEN.
    """
    sink = _Sink(Path(path))
    try:
        os.close(sink.open())
    except OSError:
        raise StorageError(Code.LOG_OPEN, "The log file could not be opened.") from None

    def refine(_logger: object, _method: str, fields: Fields) -> Fields:
        return refined(fields, strict=strict)

    processors: list[Callable[..., Any]] = [
        _no_exception,
        refine,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(sort_keys=True),
    ]
    wrapper = structlog.make_filtering_bound_logger(level)
    return cast("Log", structlog.wrap_logger(sink, processors=processors, wrapper_class=wrapper))


def _no_exception(_logger: object, _method: str, fields: Fields) -> Fields:
    """`log.exception` keeps the exception's type or code and loses its text and traceback."""
    raised = fields.pop("exc_info", None)
    fields.pop("stack_info", None)
    if raised is True:
        raised = sys.exc_info()[1]
    if isinstance(raised, BaseException):
        fields["error"] = raised
    return fields
