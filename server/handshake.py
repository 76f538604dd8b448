"""The coordinator's side of one epoch's handshake: collect, check, relay, judge disputes."""

from __future__ import annotations

from typing import Any

from common.crypto import labels
from common.crypto.agree import EphemeralKeys, encapsulate, pair_key
from common.crypto.digest import digest
from common.crypto.identity import verify
from common.errors import Code, ProtocolError
from common.protocol.terms import Terms
from common.protocol.transcript import confirm_tag, handshake_transcript, pair_order
from common.protocol.wire import (
    Confirm,
    ConfirmSet,
    Dispute,
    Encapsulations,
    EncapsulationSet,
    EncapsulationUpload,
    Established,
    HandshakeOpen,
    RevealRequest,
    RunKey,
    RunKeys,
    Signed,
    unpack_body,
)

# Its secrets are public: it only finds out whether a peer's key can be used at all.
_PROBE = EphemeralKeys(bytes(range(32)), bytes(range(64)))


class Opening:
    """An epoch whose members are shaking hands. Lives in memory: a crash opens a new epoch."""

    def __init__(
        self, terms: Terms, study: bytes, run: bytes, epoch: int, members: tuple[str, ...]
    ) -> None:
        self._terms = terms
        self._open = HandshakeOpen(study, run, epoch, members)
        self.members = members
        self.transcript = b""
        self._keys: dict[str, Signed] = {}
        self._encapsulations: dict[str, EncapsulationUpload] = {}
        self._confirmations: dict[str, Signed] = {}
        self._established: set[str] = set()
        self._reveals: dict[str, Dispute] = {}

    def missing_keys(self) -> set[str]:
        """Members that have not sent a run key."""
        return set(self.members) - set(self._keys)

    def missing(self) -> set[str]:
        """Members whose answer the current step needs."""
        for answered in (self._keys, self._encapsulations, self._confirmations):
            if len(answered) < len(self.members):
                return set(self.members) - set(answered)
        return set(self.members) - self._established

    def ask(self, sites: set[str]) -> dict[str, Any]:
        """The current step's message for each of these members."""
        chosen = sorted(sites & set(self.members))
        if len(self._keys) < len(self.members):
            return dict.fromkeys(chosen, self._open)
        if len(self._encapsulations) < len(self.members):
            return {v: self._run_keys() for v in chosen}
        if len(self._confirmations) < len(self.members):
            return {v: self._encapsulations_for(v) for v in chosen}
        return {v: self._confirm_set() for v in chosen}

    def _verified(self, site: str, kind: type[Any], signed: Signed) -> Any:
        statement = unpack_body(kind, signed)
        public = self._terms.roster[site]
        valid = verify(public, signed.signature, kind.LABEL, signed.body)
        if statement.site != site or site not in self.members or not valid:
            raise ProtocolError(
                Code.HANDSHAKE_SIGNATURE, f"A handshake message of {site} is forged."
            )
        return statement

    def run_key(self, site: str, signed: Signed) -> dict[str, Any]:
        """A member's run key; with the last one, everybody's go to everybody."""
        statement: RunKey = self._verified(site, RunKey, signed)
        opened = self._open
        if (statement.study, statement.run, statement.epoch) != (
            opened.study,
            opened.run,
            opened.epoch,
        ):
            raise ProtocolError(Code.HANDSHAKE_STALE, f"The run key of {site} is of another epoch.")
        if site in self._keys:
            return {}
        self._check_usable(site, statement)
        self._keys[site] = signed
        if self.missing_keys():
            return {}
        bodies = [self._keys[v].body for v in self.members]
        self.transcript = handshake_transcript(opened.study, opened.run, opened.epoch, bodies)
        return {v: self._run_keys() for v in self.members}

    def _check_usable(self, site: str, statement: RunKey) -> None:
        """Refuse keys that every other member would refuse: its owner is out, not they."""
        shown = [unpack_body(RunKey, signed) for signed in self._keys.values()]
        if any(k.x25519 == statement.x25519 or k.mlkem == statement.mlkem for k in shown):
            raise ProtocolError(
                Code.HANDSHAKE_DUPLICATE_KEY, f"{site} shows another's key.", culprit=site
            )
        try:
            encapsulate(statement.mlkem)
            _PROBE.exchange(statement.x25519)
        except ProtocolError:
            raise ProtocolError(
                Code.BAD_AGREEMENT, f"The run key of {site} is malformed or weak.", culprit=site
            ) from None

    def _run_keys(self) -> RunKeys:
        return RunKeys(self._open.epoch, tuple(self._keys[v] for v in self.members))

    def encapsulations(self, site: str, message: EncapsulationUpload) -> dict[str, Any]:
        """A member's ciphertexts; with the last ones, each goes to its receiver."""
        statement: Encapsulations = self._verified(site, Encapsulations, message.statement)
        if statement.transcript != self.transcript:
            raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{site} is in another handshake.")
        later = {v for v in self.members if v > site}
        exact = set(statement.digests) == later and set(message.ciphertexts) == later
        if not exact or any(
            digest(labels.CIPHERTEXT, ct) != statement.digests[v]
            for v, ct in message.ciphertexts.items()
        ):
            raise ProtocolError(
                Code.HANDSHAKE_ENCAPSULATION, f"The ciphertexts of {site} do not fit.", culprit=site
            )
        if site in self._encapsulations:
            return {}
        self._encapsulations[site] = message
        if len(self._encapsulations) < len(self.members):
            return {}
        return {v: self._encapsulations_for(v) for v in self.members}

    def _encapsulations_for(self, site: str) -> EncapsulationSet:
        earlier = [v for v in self.members if v < site]
        return EncapsulationSet(
            self.transcript,
            tuple(self._encapsulations[v].statement for v in earlier),
            {v: self._encapsulations[v].ciphertexts[site] for v in earlier},
        )

    def confirm(self, site: str, signed: Signed) -> dict[str, Any]:
        """A member's confirmation; with the last one, everybody's go to everybody."""
        statement: Confirm = self._verified(site, Confirm, signed)
        if statement.transcript != self.transcript:
            raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{site} is in another handshake.")
        if site in self._confirmations:
            return {}
        self._confirmations[site] = signed
        if len(self._confirmations) < len(self.members):
            return {}
        return {v: self._confirm_set() for v in self.members}

    def _confirm_set(self) -> ConfirmSet:
        return ConfirmSet(self.transcript, tuple(self._confirmations[v] for v in self.members))

    def established(self, site: str, signed: Signed) -> bool:
        """Note that a member's pair keys are confirmed; True with the last one."""
        statement: Established = self._verified(site, Established, signed)
        if statement.transcript != self.transcript or len(self._confirmations) < len(self.members):
            raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{site} is in another handshake.")
        self._established.add(site)
        return self._established == set(self.members)

    # ------------------------------------------------------------ disputes

    def dispute(self, site: str, signed: Signed) -> tuple[str | None, dict[str, RevealRequest]]:
        """Judge a pair that does not confirm: (culprit, {}) or (None, who must reveal, too).

        The later site of a pair holds the ML-KEM key, so its reveal alone rebuilds the pair
        key; whoever signed a tag that does not fit that key is the culprit.
        """
        statement: Dispute = self._verified(site, Dispute, signed)
        pair = statement.peer in self.members and statement.peer != site
        if statement.transcript != self.transcript or not pair:
            raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{site} disputes another handshake.")
        if len(self._confirmations) < len(self.members):
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, f"{site} disputes what was not shown.")
        self._reveals[site] = statement
        low, high = pair_order(site, statement.peer)
        reveal = self._reveals.get(high)
        if reveal is None:
            return None, {high: RevealRequest(self.transcript, low)}
        return self._judge(low, high, reveal), {}

    def _judge(self, low: str, high: str, reveal: Dispute) -> str:
        keys = EphemeralKeys.from_revealed(reveal.x25519_secret, reveal.mlkem_seed)
        promised: RunKey = unpack_body(RunKey, self._keys[high])
        if keys.public != (promised.x25519, promised.mlkem):
            return high
        other: RunKey = unpack_body(RunKey, self._keys[low])
        ciphertext = self._encapsulations[low].ciphertexts[high]
        try:
            key = pair_key(
                own=keys,
                peer_x25519=other.x25519,
                kem_shared=keys.decapsulate(ciphertext),
                ciphertext=ciphertext,
                salt=self.transcript,
                low=low,
                high=high,
            )
        except ProtocolError:
            return low
        for sender, receiver in ((low, high), (high, low)):
            said: Confirm = unpack_body(Confirm, self._confirmations[sender])
            if said.tags.get(receiver) != confirm_tag(key, self.transcript, sender, receiver):
                return sender
        # Every tag fits: the dispute itself was false.
        return low if self._reveals.get(low) is not None else high
