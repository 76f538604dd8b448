"""The effects that both sides' machines ask of their drivers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Buffers = Iterable[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Persist:
    """Make this record durable before anything that follows."""

    record: bytes


@dataclass(frozen=True, slots=True)
class PutBlob:
    """Keep large bytes beside the record."""

    name: str
    parts: Buffers


@dataclass(frozen=True, slots=True)
class DropBlob:
    """Forget large bytes."""

    name: str


@dataclass(frozen=True, slots=True)
class Note:
    """An audit event, in the words of common.audit."""

    event: str
    fields: Mapping[str, str | int | tuple[str, ...]]
