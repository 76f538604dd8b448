"""The canonical encoding, and the digests and keys derived from it (PROTOCOL.md, "Encoding").

    bytes   'b'  length  payload
    str     's'  length  UTF-8
    int     'i'  16 bytes, two's complement, big-endian
    list    'l'  count   items            (tuples and lists are one thing; decoded as tuple)
    dict    'd'  count   key value ...    (keys str, bytes or int, ascending by encoded key)

Lengths and counts are 8 bytes, big-endian. Every field has a fixed width or is preceded by
its length, so the encoding is prefix-free and therefore injective: two values share an
encoding only if they are equal.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from common.crypto import labels
from common.errors import Code, ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Value: TypeAlias = (
    bytes | bytearray | memoryview | str | int | Sequence["Value"] | Mapping[Any, "Value"]
)
Buffer: TypeAlias = "bytes | bytearray | memoryview | NDArray[Any]"

DIGEST_BYTES: Final = 32
CHUNK_BYTES: Final = 4 << 20
VIEW_BYTES: Final = 4096
MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 1 << 18

_BYTES, _TEXT, _INT, _LIST, _DICT = b"bsild"
_HEAD_BYTES = 9
_INT_BYTES = 16
_HEAD = struct.Struct(">BQ")
_head, _head_at = _HEAD.pack, _HEAD.unpack_from
_KNOWN = 256
_BYTES_HEADS = tuple(_head(_BYTES, length) for length in range(_KNOWN))


# ------------------------------------------------------------------------------- encoding
def encode(value: Value) -> bytes:
    """The canonical encoding of `value`.

    Guarantee: injective; `encode(decode(x)) == x` for every x that `decode` accepts.

    Raises:
        TypeError: a type outside the table above; bool, None, float and subclasses among them.
        ValueError: an integer outside 128 bits, or a string that is not Unicode.

    Source: PROTOCOL.md, "Encoding".
    """
    return b"".join(encode_parts(value))


def encode_parts(value: Value) -> list[bytes | memoryview]:
    """The canonical encoding of `value` as pieces, so that large byte strings are not copied."""
    parts: list[bytes | memoryview] = []
    _put(value, parts)
    return parts


def _put(value: Any, parts: list[bytes | memoryview]) -> None:
    # Exact types, not isinstance: a bool is an int and a StrEnum is a str, and neither may
    # share an encoding with the plain value.
    kind = type(value)
    if kind is bytes:
        length = len(value)
        parts.append(_BYTES_HEADS[length] if length < _KNOWN else _head(_BYTES, length))
        parts.append(value)
    elif kind is str:
        parts.append(_encode_text(value))
    elif kind is int:
        parts.append(_encode_int(value))
    elif kind is tuple or kind is list:
        parts.append(_head(_LIST, len(value)))
        for item in value:
            _put(item, parts)
    elif kind is dict:
        _put_dict(value, parts)
    elif kind is memoryview or kind is bytearray:
        view = flat_view(value)
        parts.append(_head(_BYTES, len(view)))
        parts.append(view)
    else:
        raise TypeError(f"a {kind.__name__} has no canonical encoding")


# Labels, site ids and small numbers are encoded thousands of times in a round.
@lru_cache(maxsize=8192)
def _encode_text(value: str) -> bytes:
    text = value.encode()
    return _head(_TEXT, len(text)) + text


@lru_cache(maxsize=8192)
def _encode_int(value: int) -> bytes:
    try:
        return b"i" + value.to_bytes(_INT_BYTES, "big", signed=True)
    except OverflowError as error:
        raise ValueError("the integer does not fit in 128 bits") from error


def _put_dict(value: Mapping[Any, Any], parts: list[bytes | memoryview]) -> None:
    entries = []
    for key, item in value.items():
        kind = type(key)
        if kind is str:
            entries.append((_encode_text(key), item))
        elif kind is bytes or kind is int:
            entries.append((encode(key), item))
        else:
            raise TypeError(f"a {kind.__name__} is no dictionary key")
    entries.sort(key=_first)
    parts.append(_head(_DICT, len(entries)))
    for encoded, item in entries:
        parts.append(encoded)
        _put(item, parts)


def _first(entry: tuple[bytes, Value]) -> bytes:
    return entry[0]


def flat_view(buffer: Buffer) -> memoryview:
    """`buffer` as contiguous bytes without a copy (ValueError if it is not contiguous)."""
    view = memoryview(buffer)  # type: ignore[arg-type] # numpy's stubs do not say Buffer
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


# ------------------------------------------------------------------------------- decoding
def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int,
    max_depth: int = MAX_DEPTH,
    max_items: int = MAX_ITEMS,
    views: bool = False,
) -> object:
    """The value whose canonical encoding is `data`: the strict inverse of `encode`.

    Args:
        data: what a peer sent, or a stored record.
        max_bytes: the longest `data` accepted; checked before anything is read.
        max_depth: how deep lists and dictionaries may nest (0: scalars only).
        max_items: how many values in all, keys included; checked before allocation.
        views: return byte strings of at least `VIEW_BYTES` as read-only views into `data`.

    Guarantee: whatever is returned encodes to exactly `data`; lists come back as tuples.

    Raises:
        ProtocolError: MALFORMED, or OVERSIZED where a bound is passed.

    Source: PROTOCOL.md, "Encoding".
    """
    flat = data if isinstance(data, bytes) else flat_view(data)
    if len(flat) > max_bytes:
        raise ProtocolError(
            Code.OVERSIZED, f"The message has {len(flat)} bytes; its bound is {max_bytes}."
        )
    reader = _Reader(flat, max_items, views=views)
    value, end = reader.value(0, max_depth)
    if end != len(flat):
        raise _malformed("bytes follow the value")
    return value


def _malformed(why: str) -> ProtocolError:
    return ProtocolError(Code.MALFORMED, f"The message is not canonical: {why}.")


class _Reader:
    """One pass over one message; positions are passed along, bounds are checked first."""

    __slots__ = ("data", "items", "size", "view")

    def __init__(self, data: bytes | memoryview, max_items: int, *, views: bool) -> None:
        self.data = data
        self.size = len(data)
        self.items = max_items
        self.view = memoryview(data).toreadonly() if views else None

    def value(self, at: int, depth: int) -> tuple[object, int]:
        """The value that starts at `at`, and where it ends."""
        data = self.data
        start = at + _HEAD_BYTES
        if start > self.size:
            raise _malformed("it is cut short")
        self.items -= 1
        if self.items < 0:
            raise ProtocolError(Code.OVERSIZED, "The message holds more items than its bound.")
        kind, length = _head_at(data, at)
        if kind == _INT:
            return self._integer(at + 1)
        if kind in (_LIST, _DICT):
            # Nothing is allocated for the count itself: every item is bounded as it is read.
            if depth <= 0:
                raise ProtocolError(Code.OVERSIZED, "The message nests deeper than its bound.")
            read = self._list if kind == _LIST else self._dict
            return read(length, start, depth - 1)
        stop = start + length
        if stop > self.size:
            raise _malformed("it is cut short")
        if kind == _BYTES:
            if length >= VIEW_BYTES and self.view is not None:
                return self.view[start:stop], stop
            return bytes(data[start:stop]), stop
        if kind == _TEXT:
            return _text(data[start:stop]), stop
        raise _malformed("it holds an unknown type")

    def _integer(self, start: int) -> tuple[int, int]:
        stop = start + _INT_BYTES
        if stop > self.size:
            raise _malformed("it is cut short")
        return int.from_bytes(self.data[start:stop], "big", signed=True), stop

    def _list(self, count: int, at: int, depth: int) -> tuple[tuple[object, ...], int]:
        items = []
        value = self.value
        for _ in range(count):
            item, at = value(at, depth)
            items.append(item)
        return tuple(items), at

    def _dict(self, count: int, at: int, depth: int) -> tuple[dict[object, object], int]:
        entries: dict[object, object] = {}
        previous = b""
        value = self.value
        for _ in range(count):
            key, end = value(at, 0)  # depth 0: a key is a scalar
            encoded = bytes(self.data[at:end])
            if encoded <= previous:
                raise _malformed("dictionary keys are not in ascending order")
            previous = encoded
            if isinstance(key, memoryview):
                key = bytes(key)
            entries[key], at = value(end, depth)
        return entries, at


def _text(data: bytes | memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        # The original error quotes the payload: it must not travel along.
        raise _malformed("a string is not UTF-8") from None


# ------------------------------------------------------------------------ digests and keys
def digest(label: str, *parts: Value) -> bytes:
    """SHA-256 of the encoding of (label, *parts): 32 bytes."""
    return hashlib.sha256(labelled(label, *parts)).digest()


def labelled(label: str, *parts: Value) -> bytes:
    """`encode((label, *parts))`: what is digested, signed, or names the purpose of a key."""
    pieces: list[bytes | memoryview] = [opening(label, len(parts))]
    part: Any
    for part in parts:
        # Nearly every part is a digest or a site id: those two are written here.
        kind = type(part)
        if kind is bytes and len(part) < _KNOWN:
            pieces += (_BYTES_HEADS[len(part)], part)
        elif kind is str:
            pieces.append(_encode_text(part))
        else:
            _put(part, pieces)
    return b"".join(pieces)


@lru_cache(maxsize=1024)
def opening(label: str, count: int) -> bytes:
    """How the encoding of a label and `count` values after it begins."""
    return _head(_LIST, count + 1) + _encode_text(label)


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract with SHA-256: a 32-byte key. Source: RFC 5869."""
    return hmac.digest(salt or bytes(DIGEST_BYTES), secret, "sha256")


def hkdf_expand(key: bytes, info: bytes, length: int = DIGEST_BYTES) -> bytes:
    """HKDF-Expand with SHA-256: `length` bytes (1 to 8160). Source: RFC 5869."""
    if not 0 < length <= 255 * DIGEST_BYTES:
        raise ValueError(f"HKDF-SHA-256 gives 1 to 8160 bytes, not {length}")
    if length <= DIGEST_BYTES:
        return hmac.digest(key, info + b"\x01", "sha256")[:length]
    block = b""
    output = b""
    counter = 1
    while len(output) < length:
        block = hmac.digest(key, block + info + bytes((counter,)), "sha256")
        output += block
        counter += 1
    return output[:length]


def expand(key: bytes, label: str, *parts: Value, length: int = DIGEST_BYTES) -> bytes:
    """A key of `length` bytes for one purpose: HKDF-Expand of `key` under (label, *parts)."""
    return hkdf_expand(key, labelled(label, *parts), length)


class TreePart:
    """One part of a tree digest, hashed as it is produced: SHA-256 of every 4 MiB chunk."""

    __slots__ = ("_hasher", "_leaves", "_room", "length")

    def __init__(self) -> None:
        self.length = 0
        self._leaves: list[bytes] = []
        self._hasher = hashlib.sha256()
        self._room = CHUNK_BYTES

    def update(self, buffer: Buffer) -> None:
        """Append `buffer` to the part."""
        view = flat_view(buffer)
        self.length += len(view)
        while len(view) >= self._room:
            self._hasher.update(view[: self._room])
            view = view[self._room :]
            self._leaves.append(self._hasher.digest())
            self._hasher = hashlib.sha256()
            self._room = CHUNK_BYTES
        if view:
            self._hasher.update(view)
            self._room -= len(view)

    def leaves(self) -> bytes:
        """The digests of all chunks; only the last chunk may be shorter than 4 MiB."""
        full = b"".join(self._leaves)
        return full if self._room == CHUNK_BYTES else full + self._hasher.digest()


def tree_root(parts: Sequence[TreePart]) -> bytes:
    """The tree digest of parts that were hashed as they were produced."""
    return digest(labels.TREE, [(part.length, part.leaves()) for part in parts])


def tree_digest(parts: Sequence[Buffer]) -> bytes:
    """One digest over several large buffers: chunk digests, combined with every length."""
    hashed = []
    for buffer in parts:
        part = TreePart()
        part.update(buffer)
        hashed.append(part)
    return tree_root(hashed)


def tensors_digest(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """The digest of named tensors: names, element types, exact shapes and bytes.

    Guarantee: a 0-d tensor and one of shape (1,) differ; memory layout and the mapping's
    order do not matter.

    Raises:
        TypeError: an element type that is not a plain number or boolean.
    """
    return digest(labels.TENSORS, {name: _tensor(array) for name, array in tensors.items()})


def _tensor(array: NDArray[Any]) -> tuple[str, tuple[int, ...], bytes]:
    if array.dtype.kind not in "fiub":
        raise TypeError(f"tensors of {array.dtype} have no digest")
    little = array.dtype.newbyteorder("<")
    body = array.astype(little, order="C", copy=False)
    return little.str, tuple(array.shape), hashlib.sha256(flat_view(body)).digest()
