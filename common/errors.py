"""The error tree: what a peer or a user can get wrong, with a stable code and a remedy.

    WardroundError
    ├── ConfigError      a configuration file says something it may not
    ├── DataError        a hospital's data or a model folder cannot be used
    ├── RefusedError     a hospital declines: approval, ceilings, budget, kill switch
    ├── ProtocolError    a peer's message breaks docs/PROTOCOL.md
    ├── AbortedRound     a round or a run ended without an aggregate
    └── StorageError     a disk, a journal, a ledger or an audit log failed

There are two kinds of wrong. A peer's or a user's fault is a `WardroundError`: it has a
stable code, one sentence, and what to do about it, and it never carries payload bytes.
Our own fault is a bug: it is an ordinary Python exception and it surfaces.
"""

from __future__ import annotations

from common.codes import Code

__all__ = [
    "AbortedRound",
    "Code",
    "ConfigError",
    "DataError",
    "ProtocolError",
    "RefusedError",
    "StorageError",
    "WardroundError",
]


class WardroundError(Exception):
    """A peer's or a user's fault, with a stable code and a remedy.

    Args:
        code: the stable code; its meaning and default remedy are in `common.codes`.
        message: one sentence that says what is wrong, without payload, text or secrets.
        remedy: what to do about it, where the code's own remedy can be made more exact.
    """

    exit_status = 1

    def __init__(self, code: Code, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = code.remedy if remedy is None else remedy

    def __str__(self) -> str:
        return f"{self.code.label}: {self.message}"

    def report(self) -> str:
        """The two lines a person reads: what is wrong, and what to do."""
        return f"{self}\n  what to do: {self.remedy}"


class ConfigError(WardroundError):
    """A configuration file says something it may not."""

    exit_status = 2


class DataError(WardroundError):
    """A hospital's data or a model folder cannot be used."""

    exit_status = 3


class RefusedError(WardroundError):
    """A hospital declines to take part: approval, ceilings, budget or kill switch."""

    exit_status = 4


class ProtocolError(WardroundError):
    """A peer's message breaks docs/PROTOCOL.md.

    Args:
        culprit: the site that signed the offending message, or None where the message
            came from the coordinator or cannot be attributed.
    """

    exit_status = 5

    def __init__(
        self, code: Code, message: str, *, culprit: str | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(code, message, remedy=remedy)
        self.culprit = culprit


class AbortedRound(WardroundError):  # noqa: N818 - the protocol's own word (docs/PROTOCOL.md)
    """A round or a run ended without an aggregate."""

    exit_status = 6


class StorageError(WardroundError):
    """A disk, a journal, a ledger or an audit log failed."""

    exit_status = 7
