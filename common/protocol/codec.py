"""How a message's fields are written and checked: one `Field` per wire type, each bounded.

Bytes become typed, bounded, frozen values once, here; nothing behind this module checks
lengths again (docs/PROTOCOL.md, "Encoding").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from common.errors import Code, ProtocolError
from common.ids import is_site_id

T = TypeVar("T")

MAX_PARTIES = 512
MAX_ROUND = 2**31
_BYTES = (bytes, memoryview)


@dataclass(frozen=True)
class Field:
    """A wire type: `load` turns a decoded value into a typed one or raises ValueError."""

    load: Callable[[Any], Any]
    dump: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def octets(minimum: int, maximum: int) -> Field:
    """Byte strings of `minimum` to `maximum` bytes."""

    def load(value: Any) -> bytes:
        if not isinstance(value, _BYTES) or not minimum <= len(value) <= maximum:
            raise ValueError("byte string out of bounds")
        return value if isinstance(value, bytes) else bytes(value)

    return Field(load, _same)


def buffer(maximum: int) -> Field:
    """Large byte strings that stay views of the received message."""

    def load(value: Any) -> memoryview:
        if not isinstance(value, _BYTES) or len(value) > maximum:
            raise ValueError("buffer out of bounds")
        return memoryview(value)

    return Field(load, _same)


def integer(minimum: int, maximum: int) -> Field:
    """Whole numbers from `minimum` to `maximum`."""

    def load(value: Any) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise ValueError("integer out of bounds")
        return value

    return Field(load, _same)


def text(maximum: int) -> Field:
    """Short strings."""

    def load(value: Any) -> str:
        if not isinstance(value, str) or len(value) > maximum:
            raise ValueError("string out of bounds")
        return value

    return Field(load, _same)


def _load_site(value: Any) -> str:
    if not isinstance(value, str) or not is_site_id(value):
        raise ValueError("not a site id")
    return value


SITE = Field(_load_site, _same)
DIGEST = octets(32, 32)
SIGNATURE = octets(64, 64)
ROUND = integer(0, MAX_ROUND)


def sequence(item: Field, maximum: int = MAX_PARTIES) -> Field:
    """Tuples of one wire type."""

    def load(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, tuple) or len(value) > maximum:
            raise ValueError("sequence out of bounds")
        return tuple(map(item.load, value))

    def dump(value: Any) -> tuple[Any, ...]:
        return tuple(map(item.dump, value))

    return Field(load, _same if item.dump is _same else dump)


def mapping(item: Field, key: Field = SITE, maximum: int = MAX_PARTIES) -> Field:
    """Maps from site id (or another key) to one wire type."""

    def load(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > maximum:
            raise ValueError("map out of bounds")
        load_key, load_item = key.load, item.load
        return {load_key(k): load_item(v) for k, v in value.items()}

    def dump(value: Any) -> dict[str, Any]:
        dump_item = item.dump
        return {k: dump_item(v) for k, v in value.items()}

    return Field(load, _same if item.dump is _same else dump)


def record(kind: type[Any]) -> Field:
    """A nested wire record: a frozen dataclass with a `FIELDS` table."""

    def load(value: Any) -> Any:
        return load_record(kind, value)

    return Field(load, dump_record)


def optional(item: Field) -> Field:
    """Zero or one value, written as an empty or one-element tuple."""

    def load(value: Any) -> Any:
        if not isinstance(value, tuple) or len(value) > 1:
            raise ValueError("not an optional")
        return item.load(value[0]) if value else None

    def dump(value: Any) -> tuple[Any, ...]:
        return () if value is None else (item.dump(value),)

    return Field(load, dump)


def dump_record(value: Any) -> tuple[Any, ...]:
    """The encodable tuple of a wire record, fields in table order."""
    return tuple([field.dump(getattr(value, name)) for name, field in value.FIELDS])


def load_record(kind: type[T], value: Any) -> T:
    """The typed record of a decoded tuple. Raises ValueError."""
    fields: tuple[tuple[str, Field], ...] = kind.FIELDS  # type: ignore[attr-defined]
    if not isinstance(value, tuple) or len(value) != len(fields):
        raise ValueError("wrong number of fields")
    return kind(*[field.load(entry) for (_, field), entry in zip(fields, value, strict=True)])


def malformed(what: str) -> ProtocolError:
    """The error for bytes that are not the message they claim to be."""
    return ProtocolError(Code.MALFORMED, f"A {what} is malformed.")
