"""One hospital's state in a run, which the handlers of every phase share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.handshake import Handshake
from client.round.effects import Send
from client.round.record import SiteRecord
from common.crypto.identity import SiteKey
from common.ports import Entropy
from common.protocol.effects import Persist
from common.protocol.terms import Terms
from common.protocol.transcript import Chain
from common.protocol.wire import Header, Signed, pack_statement, sign
from common.tensors import state_digest

NO_RUN = bytes(32)


@dataclass(slots=True)
class RoundSecrets:
    """Of the open round, in memory only."""

    header: Header
    header_hash: bytes
    self_secret: bytes
    seeds: dict[str, bytes]
    tags: dict[str, bytes]
    own_shares: bytes
    head: Signed
    ready: bytes
    update: NDArray[np.float32] | NDArray[np.int32] | None
    words: Mapping[int, NDArray[np.int64] | None]


class SiteState:
    """Where one hospital stands in one run: what is durable, and what is of the open round."""

    def __init__(
        self,
        terms: Terms,
        site: str,
        key: SiteKey,
        entropy: Entropy,
        ledger_contains: Callable[[int, bytes], bool],
        record: SiteRecord,
    ) -> None:
        self.terms = terms
        self.site = site
        self.key = key
        self.entropy = entropy
        self.ledger_contains = ledger_contains
        self.record = record
        self.chain: Chain | None = None
        if record.version == 0:
            self.chain = Chain.genesis(terms, state_digest(terms.initial))
        self.handshake: Handshake | None = None
        self.secrets: RoundSecrets | None = None
        self.pending: tuple[Header, bytes] | None = None

    def persist(self, **changes: Any) -> Persist:  # private: named fields of SiteRecord
        """Change named fields of the record; the change is durable once executed."""
        self.record = replace(self.record, **changes)
        return Persist(self.record.dump())

    def forget(self) -> None:
        """Let go of the open round's secrets."""
        self.secrets = None
        self.pending = None

    def say(self, statement: Any) -> Send:
        """Sign a statement and send it."""
        return self.say_signed(type(statement), sign(self.key, statement))

    def say_signed(self, kind: type[Any], signed: Signed) -> Send:
        """Send a signed statement."""
        return Send(pack_statement(kind, signed))
