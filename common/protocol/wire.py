"""Every message of docs/PROTOCOL.md: its fields, their bounds, and the canonical codec.

A message on the wire is `encode((tag, fields...))`. What a site says is wrapped in `Signed`:
the body's exact bytes, and an Ed25519 signature over (label, body). Relayed statements stay
in those bytes, so a statement's digest never depends on who encodes it.
Guarantee: `unpack(pack(m)) == m`, and bytes that unpack re-pack to the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from common.crypto import labels
from common.crypto.digest import decode, encode, opening
from common.crypto.identity import SiteKey
from common.protocol.codec import (
    DIGEST,
    ROUND,
    SIGNATURE,
    SITE,
    Field,
    buffer,
    dump_record,
    integer,
    load_record,
    malformed,
    mapping,
    octets,
    optional,
    record,
    sequence,
    text,
)
from common.secagg.masking import Lane

X25519_BYTES = 32
MLKEM_PUBLIC_BYTES = 1184
MLKEM_CIPHERTEXT_BYTES = 1088
TAG_BYTES = 16
SHARE_BYTES = 33
SALT_BYTES = 16
# A sealed pair of shares: two shares, two salts, the AEAD's tag.
SEALED_SHARES_BYTES = 2 * SHARE_BYTES + 2 * SALT_BYTES + 16
# What a head says of one peer: pair tag, digest of the sealed shares, two share commitments.
PAIR_BYTES = TAG_BYTES + 3 * 32
MAX_PLANE_BYTES = 2**33
MAX_SMALL_MESSAGE = 2**24

Table = tuple[tuple[str, Field], ...]

_KIND = text(16)
_COUNTER = integer(0, 2**62)


@dataclass(frozen=True, slots=True)
class Signed:
    """A site's statement: the body's exact bytes and the signature over (label, body)."""

    body: bytes
    signature: bytes

    FIELDS: ClassVar[Table] = (("body", octets(1, MAX_SMALL_MESSAGE)), ("signature", SIGNATURE))


SIGNED = record(Signed)


@dataclass(frozen=True, slots=True)
class Witness:
    """A ledger's position: how many rows, and the hash of the last one."""

    counter: int
    head: bytes

    FIELDS: ClassVar[Table] = (("counter", _COUNTER), ("head", DIGEST))


# ---------------------------------------------------------------- handshake


@dataclass(frozen=True, slots=True)
class HandshakeOpen:
    """Coordinator: the members of a new epoch."""

    study: bytes
    run: bytes
    epoch: int
    members: tuple[str, ...]

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("members", sequence(SITE)),
    )


@dataclass(frozen=True, slots=True)
class RunKey:
    """Site: fresh public keys for one epoch."""

    study: bytes
    run: bytes
    epoch: int
    site: str
    x25519: bytes
    mlkem: bytes
    nonce: bytes

    LABEL: ClassVar[str] = labels.RUN_KEY
    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("site", SITE),
        ("x25519", octets(X25519_BYTES, X25519_BYTES)),
        ("mlkem", octets(MLKEM_PUBLIC_BYTES, MLKEM_PUBLIC_BYTES)),
        ("nonce", DIGEST),
    )


@dataclass(frozen=True, slots=True)
class RunKeys:
    """Coordinator: every member's run key."""

    epoch: int
    keys: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (("epoch", ROUND), ("keys", sequence(SIGNED)))


@dataclass(frozen=True, slots=True)
class Encapsulations:
    """Site: digests of its ML-KEM ciphertexts for the members after it."""

    transcript: bytes
    site: str
    digests: dict[str, bytes]

    LABEL: ClassVar[str] = labels.ENCAPSULATIONS
    FIELDS: ClassVar[Table] = (
        ("transcript", DIGEST),
        ("site", SITE),
        ("digests", mapping(DIGEST)),
    )


@dataclass(frozen=True, slots=True)
class EncapsulationUpload:
    """Site to coordinator: the signed digests and the ciphertexts themselves."""

    statement: Signed
    ciphertexts: dict[str, bytes]

    FIELDS: ClassVar[Table] = (
        ("statement", SIGNED),
        ("ciphertexts", mapping(octets(MLKEM_CIPHERTEXT_BYTES, MLKEM_CIPHERTEXT_BYTES))),
    )


@dataclass(frozen=True, slots=True)
class EncapsulationSet:
    """Coordinator: for one site, the statements of the members before it and its ciphertexts."""

    transcript: bytes
    statements: tuple[Signed, ...]
    ciphertexts: dict[str, bytes]

    FIELDS: ClassVar[Table] = (
        ("transcript", DIGEST),
        ("statements", sequence(SIGNED)),
        ("ciphertexts", mapping(octets(MLKEM_CIPHERTEXT_BYTES, MLKEM_CIPHERTEXT_BYTES))),
    )


@dataclass(frozen=True, slots=True)
class Confirm:
    """Site: one key-confirmation tag per member."""

    transcript: bytes
    site: str
    tags: dict[str, bytes]

    LABEL: ClassVar[str] = labels.CONFIRM
    FIELDS: ClassVar[Table] = (
        ("transcript", DIGEST),
        ("site", SITE),
        ("tags", mapping(octets(TAG_BYTES, TAG_BYTES))),
    )


@dataclass(frozen=True, slots=True)
class ConfirmSet:
    """Coordinator: every member's confirmation."""

    transcript: bytes
    confirmations: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (("transcript", DIGEST), ("confirmations", sequence(SIGNED)))


@dataclass(frozen=True, slots=True)
class Established:
    """Site: all its pair keys of the epoch are confirmed."""

    transcript: bytes
    site: str

    LABEL: ClassVar[str] = labels.ESTABLISHED
    FIELDS: ClassVar[Table] = (("transcript", DIGEST), ("site", SITE))


@dataclass(frozen=True, slots=True)
class Dispute:
    """Site: a pair does not confirm; the site's ephemeral keys of this dead epoch, revealed."""

    transcript: bytes
    site: str
    peer: str
    x25519_secret: bytes
    mlkem_seed: bytes

    LABEL: ClassVar[str] = labels.DISPUTE
    FIELDS: ClassVar[Table] = (
        ("transcript", DIGEST),
        ("site", SITE),
        ("peer", SITE),
        ("x25519_secret", octets(32, 32)),
        ("mlkem_seed", octets(64, 64)),
    )


@dataclass(frozen=True, slots=True)
class RevealRequest:
    """Coordinator: asks the other side of a disputed pair to reveal, too."""

    transcript: bytes
    peer: str

    FIELDS: ClassVar[Table] = (("transcript", DIGEST), ("peer", SITE))


# ---------------------------------------------------------------- round


def _load_lane(value: Any) -> Lane:
    if not isinstance(value, tuple) or len(value) != len(_LANE):
        raise ValueError("wrong number of fields")
    return Lane(*(field.load(entry) for field, entry in zip(_LANE, value, strict=True)))


_LANE = (integer(0, 7), integer(16, 64), integer(1, 2**36))
LANE = Field(_load_lane, lambda lane: (lane.lane_id, lane.bits, lane.length))


@dataclass(frozen=True, slots=True)
class Header:
    """What a round is, as each site computes it; its digest is the header hash hh."""

    study: bytes
    run: bytes
    transcript: bytes
    round: int
    kind: str
    turn: int
    state: bytes
    prev: bytes
    lanes: tuple[Lane, ...]
    exponents: tuple[int, ...]

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("transcript", DIGEST),
        ("round", ROUND),
        ("kind", _KIND),
        ("turn", ROUND),
        ("state", DIGEST),
        ("prev", DIGEST),
        ("lanes", sequence(LANE, 4)),
        ("exponents", sequence(integer(-1000, 1000), 2**20)),
    )


@dataclass(frozen=True, slots=True)
class Link:
    """A completed round: its header, its certificate by a quorum, and the aggregate's words."""

    header: Header
    heads: dict[str, bytes]
    roots: dict[str, bytes]
    agreements: tuple[Signed, ...]
    sums: tuple[memoryview, ...]

    FIELDS: ClassVar[Table] = (
        ("header", record(Header)),
        ("heads", mapping(DIGEST)),
        ("roots", mapping(DIGEST)),
        ("agreements", sequence(SIGNED)),
        ("sums", sequence(buffer(MAX_PLANE_BYTES), 4)),
    )


@dataclass(frozen=True, slots=True)
class RoundStart:
    """Coordinator: begin a round on the model that `link` certifies.

    `base` is the state the link's round trained from, for a site that does not hold it;
    `burns` are the burn statements of the rounds tried since.
    """

    study: bytes
    run: bytes
    epoch: int
    round: int
    kind: str
    link: Link | None
    base: memoryview | None
    burns: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("round", ROUND),
        ("kind", _KIND),
        ("link", optional(record(Link))),
        ("base", optional(buffer(MAX_PLANE_BYTES))),
        ("burns", sequence(SIGNED, 4096)),
    )


@dataclass(frozen=True, slots=True)
class Head:
    """Site: its commitments for one round.

    `pairs[v]` is tag, digest of the shares sealed for v, and the salted commitments to v's
    self share and recovery share (PAIR_BYTES). `own` are the two commitments to its own pair
    of shares. `ledger` is its privacy ledger's position, `witnessed` the positions it has seen.
    """

    header: bytes
    round: int
    site: str
    self_commitment: bytes
    recovery_commitment: bytes
    blob: bytes
    nonce: bytes
    own: bytes
    pairs: dict[str, bytes]
    ledger: Witness
    witnessed: dict[str, Witness]

    LABEL: ClassVar[str] = labels.READY
    FIELDS: ClassVar[Table] = (
        ("header", DIGEST),
        ("round", ROUND),
        ("site", SITE),
        ("self_commitment", DIGEST),
        ("recovery_commitment", DIGEST),
        ("blob", DIGEST),
        ("nonce", DIGEST),
        ("own", octets(64, 64)),
        ("pairs", mapping(octets(PAIR_BYTES, PAIR_BYTES))),
        ("ledger", record(Witness)),
        ("witnessed", mapping(record(Witness))),
    )


_SEALED = mapping(octets(SEALED_SHARES_BYTES, SEALED_SHARES_BYTES))


@dataclass(frozen=True, slots=True)
class Ready:
    """Site to coordinator: its signed head, its recovery blob, and the sealed shares."""

    head: Signed
    blob: bytes
    shares: dict[str, bytes]

    FIELDS: ClassVar[Table] = (("head", SIGNED), ("blob", octets(16, 2**20)), ("shares", _SEALED))


@dataclass(frozen=True, slots=True)
class Participants:
    """Coordinator: the heads of everybody in the round, and the shares sealed for this site."""

    round: int
    heads: tuple[Signed, ...]
    shares: dict[str, bytes]

    FIELDS: ClassVar[Table] = (("round", ROUND), ("heads", sequence(SIGNED)), ("shares", _SEALED))


@dataclass(frozen=True, slots=True)
class Receipt:
    """Site: "my masked update with this root belongs to these participants"."""

    participants: bytes
    site: str
    root: bytes

    LABEL: ClassVar[str] = labels.UPLOAD
    FIELDS: ClassVar[Table] = (("participants", DIGEST), ("site", SITE), ("root", DIGEST))


@dataclass(frozen=True, slots=True)
class Upload:
    """Site to coordinator: the signed receipt and the masked planes, lane by lane."""

    receipt: Signed
    planes: tuple[memoryview, ...]

    FIELDS: ClassVar[Table] = (
        ("receipt", SIGNED),
        ("planes", sequence(buffer(MAX_PLANE_BYTES), 8)),
    )


@dataclass(frozen=True, slots=True)
class Survivors:
    """Coordinator: the receipts of every upload that arrived."""

    round: int
    receipts: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (("round", ROUND), ("receipts", sequence(SIGNED)))


@dataclass(frozen=True, slots=True)
class Agree:
    """Site: the one survivor set it will ever sign in this round."""

    study: bytes
    run: bytes
    round: int
    site: str
    survivors: bytes

    LABEL: ClassVar[str] = labels.AGREE
    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("round", ROUND),
        ("site", SITE),
        ("survivors", DIGEST),
    )


@dataclass(frozen=True, slots=True)
class Agreements:
    """Coordinator: a quorum of agreements."""

    round: int
    agreements: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (("round", ROUND), ("agreements", sequence(SIGNED)))


_SALTED_SHARE = octets(SHARE_BYTES + SALT_BYTES, SHARE_BYTES + SALT_BYTES)


@dataclass(frozen=True, slots=True)
class Unmask:
    """Site: its self shares of the survivors and its recovery shares of the dropouts."""

    survivors: bytes
    site: str
    self_shares: dict[str, bytes]
    recovery_shares: dict[str, bytes]

    LABEL: ClassVar[str] = labels.UNMASK
    FIELDS: ClassVar[Table] = (
        ("survivors", DIGEST),
        ("site", SITE),
        ("self_shares", mapping(_SALTED_SHARE)),
        ("recovery_shares", mapping(_SALTED_SHARE)),
    )


@dataclass(frozen=True, slots=True)
class BurnRequest:
    """Coordinator: asks for a signature that this round never ends in an aggregate."""

    study: bytes
    run: bytes
    round: int

    FIELDS: ClassVar[Table] = (("study", DIGEST), ("run", DIGEST), ("round", ROUND))


@dataclass(frozen=True, slots=True)
class Burn:
    """Site: "I have not agreed to this round's survivors and never will"."""

    study: bytes
    run: bytes
    round: int
    site: str

    LABEL: ClassVar[str] = labels.BURN
    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("round", ROUND),
        ("site", SITE),
    )


@dataclass(frozen=True, slots=True)
class Finished:
    """Coordinator: the run is over; the last completed round's link."""

    study: bytes
    run: bytes
    link: Link | None
    base: memoryview | None

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("link", optional(record(Link))),
        ("base", optional(buffer(MAX_PLANE_BYTES))),
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """Coordinator: the run is over before its last turn; the last completed round's link.

    `refusals` are so many sites' word that their budgets are spent that no quorum is left.
    """

    study: bytes
    run: bytes
    link: Link | None
    base: memoryview | None
    refusals: tuple[Signed, ...]

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("link", optional(record(Link))),
        ("base", optional(buffer(MAX_PLANE_BYTES))),
        ("refusals", sequence(SIGNED)),
    )


# ---------------------------------------------------------------- at any time


@dataclass(frozen=True, slots=True)
class Hello:
    """Site: it is here, and how far its journal has come. A hint: nothing depends on it."""

    study: bytes
    site: str
    epoch: int
    round: int
    version: int

    LABEL: ClassVar[str] = labels.HELLO
    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("site", SITE),
        ("epoch", ROUND),
        ("round", ROUND),
        ("version", ROUND),
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Site: it declines something, with a stable code and nothing else."""

    study: bytes
    site: str
    round: int
    code: str
    culprit: str

    LABEL: ClassVar[str] = labels.REFUSAL
    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("site", SITE),
        ("round", ROUND),
        ("code", text(16)),
        ("culprit", text(63)),
    )


FROM_COORDINATOR: tuple[type[Any], ...] = (
    HandshakeOpen,
    RunKeys,
    EncapsulationSet,
    ConfirmSet,
    RevealRequest,
    RoundStart,
    Participants,
    Survivors,
    Agreements,
    BurnRequest,
    Finished,
    Ended,
)
# Statements travel as `Signed` under their tag; the three uploads carry more than a statement.
STATEMENTS: tuple[type[Any], ...] = (
    RunKey,
    Confirm,
    Established,
    Dispute,
    Agree,
    Unmask,
    Burn,
    Hello,
    Refusal,
)
UPLOADS: tuple[type[Any], ...] = (EncapsulationUpload, Ready, Upload)


_COORDINATOR_TAGS = {kind.__name__: kind for kind in FROM_COORDINATOR}
_SITE_TAGS = {kind.__name__: kind for kind in (*STATEMENTS, *UPLOADS)}


def sign(key: SiteKey, statement: Any) -> Signed:
    """The statement's canonical bytes under the site's key and the statement's label."""
    body = encode(dump_record(statement))
    return Signed(body, key.sign(statement.LABEL, body))


def pack(message: Any) -> bytes:
    """The wire bytes of a coordinator's message or a site's upload."""
    return encode((type(message).__name__, *dump_record(message)))


def pack_statement(kind: type[Any], signed: Signed) -> bytes:
    """The wire bytes of a signed statement of the given kind."""
    return encode((kind.__name__, signed.body, signed.signature))


def unpack_body(kind: type[Any], signed: Signed) -> Any:
    """The statement inside `signed`, typed and bounded. Raises ProtocolError.

    Remembers the last bodies: the same statement is looked at in several phases, and nobody
    changes a parsed one.
    """
    return _unpacked(kind, signed.body)  # type: ignore[arg-type]  # a class is hashable


@lru_cache(maxsize=2048)
def _unpacked(kind: type[Any], body: bytes) -> Any:
    value = decode(body, max_bytes=MAX_SMALL_MESSAGE)
    try:
        return load_record(kind, value)
    except ValueError:
        raise malformed(kind.__name__) from None


def unpack_from_coordinator(payload: bytes, max_bytes: int) -> Any:
    """A coordinator's message. Raises ProtocolError."""
    tag, fields = _split(payload, max_bytes)
    kind = _COORDINATOR_TAGS.get(tag)
    if kind is None:
        raise malformed("coordinator's message")
    try:
        return load_record(kind, fields)
    except ValueError:
        raise malformed(kind.__name__) from None


def unpack_from_site(payload: bytes, max_bytes: int) -> tuple[type[Any], Any]:
    """A site's message: its kind, and the `Signed` statement or the upload.

    Raises ProtocolError.
    """
    tag, fields = _split(payload, max_bytes)
    kind = _SITE_TAGS.get(tag)
    if kind is None:
        raise malformed("site's message")
    try:
        return kind, load_record(Signed if kind in STATEMENTS else kind, fields)
    except ValueError:
        raise malformed(kind.__name__) from None


def claims(payload: bytes, kind: type[Any]) -> bool:
    """Whether a message begins as one of this kind does; nothing else of it is read."""
    return payload.startswith(opening(kind.__name__, len(kind.FIELDS)))


def _split(payload: bytes, max_bytes: int) -> tuple[str, tuple[Any, ...]]:
    value = decode(payload, max_bytes=max_bytes, views=True)
    if not isinstance(value, tuple) or not value or not isinstance(value[0], str):
        raise malformed("message")
    return value[0], value[1:]
