"""The hospital's ClientApp: opens a signed question, asks the hospital, signs its answer.

A thin shell between Flower's messages and `Hospital`. It runs installed code only: nothing here
asks for, unpacks or imports what the coordinator offers. What leaves is a payload of our
protocol or a code; no exception's text ever does (PROTOCOL.md, "Envelope").
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    RecordDict,
)
from flwr.clientapp import ClientApp

from client.answer import Answer, Hospital, answered, report
from common.errors import Code, ProtocolError, WardroundError
from common.ids import DIGEST_BYTES, is_site_id
from common.protocol.envelope import MAX_PAYLOADS, NONCE_BYTES, Envelope

__all__ = ["Answer", "Hospital", "app", "bind", "opened", "sealed", "shell", "shell_by_context"]

STYPE: Final = "wardround.bytes"
SIGNATURE_BYTES: Final = 64
# Flower's number for "the app raised"; what went wrong is said by the code beside it.
ERROR_NUMBER: Final = 2
_FIELDS: Final = {
    "study": bytes,
    "sender": str,
    "recipient": str,
    "nonce": bytes,
    "code": str,
    "signature": bytes,
    "payloads": int,
}


# ---------------------------------------------------------------------------- records
def sealed(envelope: Envelope, payloads: Sequence[bytes]) -> RecordDict:
    """The records that carry `payloads` and the envelope over them; payloads are not copied."""
    fields: dict[str, Any] = {
        name: getattr(envelope, name) for name in _FIELDS if name != "payloads"
    }
    records: dict[str, Any] = {"envelope": ConfigRecord({**fields, "payloads": len(payloads)})}
    for index, payload in enumerate(payloads):
        data = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
        records[f"payload-{index}"] = ArrayRecord({"data": data})
    return RecordDict(records)


def opened(content: Mapping[str, Any]) -> tuple[Envelope, tuple[bytes, ...]]:
    """The envelope and the payloads of a question's or an answer's records.

    Guarantee: every field has its type and length; no signature was checked.
    Raises: ProtocolError MALFORMED, or OVERSIZED where there are too many payloads.
    """
    record = content.get("envelope")
    if not isinstance(record, ConfigRecord):
        raise _malformed("it has no envelope")
    fields = dict(record)
    if {name: type(value) for name, value in fields.items()} != _FIELDS:
        raise _malformed("its envelope has other fields")
    count = fields.pop("payloads")
    if not 0 <= count <= MAX_PAYLOADS:
        raise ProtocolError(Code.OVERSIZED, "A message carries more payloads than its bound.")
    names = [f"payload-{index}" for index in range(count)]
    if set(content) != {"envelope", *names}:
        raise _malformed("it has other payloads than its envelope says")
    envelope = Envelope(**fields)
    _check_fields(envelope)
    return envelope, tuple(_payload(content[name]) for name in names)


def _check_fields(envelope: Envelope) -> None:
    parties = (envelope.sender, envelope.recipient)
    lengths = (len(envelope.study), len(envelope.nonce), len(envelope.signature))
    if lengths != (DIGEST_BYTES, NONCE_BYTES, SIGNATURE_BYTES):
        raise _malformed("a field of its envelope has another length")
    if (
        not all(not name or is_site_id(name) for name in parties)
        or len(envelope.code) > DIGEST_BYTES
    ):
        raise _malformed("a name in its envelope is not one")


def _payload(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {"data"}:
        raise _malformed("a payload is not one array")
    array = record["data"]
    form = (array.dtype, tuple(array.shape), array.stype)
    if form != ("uint8", (len(array.data),), STYPE):
        raise _malformed("a payload is not plain bytes")
    return bytes(array.data)  # no copy: it is bytes already


def _malformed(why: str) -> ProtocolError:
    return ProtocolError(Code.MALFORMED, f"The message is not one of this protocol: {why}.")


# ---------------------------------------------------------------------------- one question
class Party(Protocol):
    """Who answers: a hospital in this process, or a resident process of it."""

    def __call__(
        self, question: Envelope, payloads: Sequence[bytes], *, hello: bool
    ) -> tuple[Envelope, tuple[bytes, ...]]:
        """The signed answer. Raises WardroundError where there is none."""
        ...


def _replied(
    find: Callable[[Context], Party], message: Message, context: Context, *, hello: bool
) -> Message:
    """The reply to one question. Raises nothing."""
    try:
        party = find(context)
        question, payloads = opened(message.content if message.has_content() else {})
        envelope, answers = party(question, payloads, hello=hello)
    except WardroundError as error:
        # Unsigned on purpose: a site signs nothing over a question that its coordinator
        # did not sign.
        return _error(message, error.code)
    except Exception as error:  # noqa: BLE001 - whatever it is, only a code may leave
        report(error)
        return _error(message, Code.INTERNAL_FAULT)
    return Message(sealed(envelope, answers), reply_to=message)


def _error(message: Message, code: Code) -> Message:
    return Message(Error(ERROR_NUMBER, code.label), reply_to=message)


# ---------------------------------------------------------------------------- the app
def shell(find: Callable[[], Hospital]) -> ClientApp:
    """A ClientApp that answers for the hospital that `find` returns."""
    return shell_by_context(lambda _context: partial(answered, find()))


def shell_by_context(find: Callable[[Context], Party]) -> ClientApp:
    """A ClientApp that answers for whoever `find` returns for a node."""
    made = ClientApp()

    def hello(message: Message, context: Context) -> Message:
        return _replied(find, message, context, hello=True)

    def step(message: Message, context: Context) -> Message:
        return _replied(find, message, context, hello=False)

    made.query("hello")(hello)
    made.query("step")(step)
    made.train("step")(step)
    return made


_BOUND: Final[list[Hospital]] = []


def bind(hospital: Hospital) -> None:
    """Make `app` answer for this hospital; a later call replaces it."""
    _BOUND[:] = [hospital]


def _bound(context: Context) -> Party:
    """The bound hospital; in a process of a stock SuperNode, the resident of its machine.

    Only the node's own configuration is looked at, which the hospital writes; nothing of the
    run's configuration, which the coordinator does.
    """
    if _BOUND:
        return partial(answered, _BOUND[0])
    from client.resident import relay_for

    return relay_for(context.node_config).answered


app = shell_by_context(_bound)
