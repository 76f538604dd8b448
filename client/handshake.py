"""One epoch's hybrid handshake at a hospital: RunKey, Encapsulations, Confirm, Established.

Every pair of members gets one key from X25519 and ML-KEM-768 together, bound to the study,
the run, the epoch and every member's signed run key. Ephemeral keys live in this object
only, until the first round of the epoch begins (docs/PROTOCOL.md, "Handshake").
"""

from __future__ import annotations

from collections.abc import Sequence

from common.crypto import labels
from common.crypto.agree import EphemeralKeys, encapsulate, pair_key
from common.crypto.digest import digest
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ProtocolError
from common.ports import Entropy
from common.protocol.terms import Terms
from common.protocol.transcript import confirm_tag, handshake_transcript, pair_order
from common.protocol.wire import (
    Confirm,
    Dispute,
    Encapsulations,
    EncapsulationSet,
    Established,
    HandshakeOpen,
    RunKey,
    Signed,
    sign,
    unpack_body,
)


class Handshake:
    """The open epoch of one site. Every check raises ProtocolError and changes nothing."""

    def __init__(
        self,
        terms: Terms,
        site: str,
        key: SiteKey,
        ephemeral: EphemeralKeys,
        run_key: RunKey,
        members: tuple[str, ...],
    ) -> None:
        self._terms = terms
        self._site = site
        self._key = key
        self._ephemeral = ephemeral
        self.run_key = run_key
        self.signed = sign(key, run_key)
        self.members = members
        self.epoch = run_key.epoch
        self.transcript = b""
        self.keys: dict[str, bytes] = {}
        self._publics: dict[str, RunKey] = {}
        self._shared: dict[str, bytes] = {}
        self._ciphertexts: dict[str, bytes] = {}
        self._statement: Signed | None = None

    @property
    def confirmed_epoch(self) -> int:
        """The epoch, once every member has signed it; 0 before that."""
        return self.epoch if self.transcript else 0

    @staticmethod
    def open(
        terms: Terms, site: str, key: SiteKey, entropy: Entropy, message: HandshakeOpen
    ) -> Handshake:
        """Fresh ephemeral keys for a new epoch."""
        ephemeral = EphemeralKeys.generate(entropy)
        x25519, mlkem = ephemeral.public
        run_key = RunKey(
            message.study, message.run, message.epoch, site, x25519, mlkem, entropy.take(32)
        )
        return Handshake(terms, site, key, ephemeral, run_key, message.members)

    def encapsulate(self, keys: Sequence[Signed]) -> tuple[Signed, dict[str, bytes]]:
        """Check every member's run key, fix the transcript, encapsulate to the members after us."""
        publics = self._check_run_keys(keys)
        transcript = handshake_transcript(
            self.run_key.study, self.run_key.run, self.epoch, [signed.body for signed in keys]
        )
        if self._statement is not None:
            if transcript != self.transcript:
                raise ProtocolError(
                    Code.HANDSHAKE_TRANSCRIPT, "Other run keys were shown in this epoch before."
                )
            return self._statement, self._ciphertexts
        for v in self.members:
            if v > self._site:
                self._shared[v], self._ciphertexts[v] = encapsulate(publics[v].mlkem)
        self._publics, self.transcript = publics, transcript
        digests = {v: digest(labels.CIPHERTEXT, ct) for v, ct in self._ciphertexts.items()}
        self._statement = sign(self._key, Encapsulations(transcript, self._site, digests))
        return self._statement, self._ciphertexts

    def _check_run_keys(self, keys: Sequence[Signed]) -> dict[str, RunKey]:
        publics: dict[str, RunKey] = {}
        seen: set[bytes] = set()
        for signed in keys:
            run_key: RunKey = unpack_body(RunKey, signed)
            v = run_key.site
            public = self._terms.roster.get(v)
            if public is None or not verify(public, signed.signature, RunKey.LABEL, signed.body):
                raise ProtocolError(Code.HANDSHAKE_SIGNATURE, f"The run key of {v} is forged.")
            mine = self.run_key
            if (run_key.study, run_key.run, run_key.epoch) != (mine.study, mine.run, mine.epoch):
                raise ProtocolError(Code.HANDSHAKE_STALE, f"The run key of {v} is not of now.")
            if run_key.x25519 in seen or run_key.mlkem in seen:
                raise ProtocolError(Code.HANDSHAKE_DUPLICATE_KEY, f"{v} shows another's key.")
            seen |= {run_key.x25519, run_key.mlkem}
            publics[v] = run_key
        if tuple(publics) != self.members:
            raise ProtocolError(Code.HANDSHAKE_MEMBERS, "The run keys are not the members'.")
        if publics[self._site] != self.run_key:
            raise ProtocolError(Code.HANDSHAKE_OWN_KEY, "This site's own run key was altered.")
        return publics

    def finish(self, message: EncapsulationSet) -> Confirm:
        """Compute every pair key and this site's confirmation tags."""
        digests = self._check_statements(message.statements)
        keys: dict[str, bytes] = {}
        for v in self.members:
            if v == self._site:
                continue
            if v > self._site:
                ciphertext, shared = self._ciphertexts[v], self._shared[v]
            else:
                ciphertext = message.ciphertexts.get(v, b"")
                if digest(labels.CIPHERTEXT, ciphertext) != digests[v]:
                    raise ProtocolError(
                        Code.HANDSHAKE_ENCAPSULATION, f"The ciphertext of {v} was altered."
                    )
                shared = self._ephemeral.decapsulate(ciphertext)
            low, high = pair_order(self._site, v)
            keys[v] = pair_key(
                own=self._ephemeral,
                peer_x25519=self._publics[v].x25519,
                kem_shared=shared,
                ciphertext=ciphertext,
                salt=self.transcript,
                low=low,
                high=high,
            )
        self.keys = keys
        tags = {v: confirm_tag(k, self.transcript, self._site, v) for v, k in keys.items()}
        return Confirm(self.transcript, self._site, tags)

    def _check_statements(self, statements: Sequence[Signed]) -> dict[str, bytes]:
        """The digest of the ciphertext that each earlier member signed for us."""
        digests: dict[str, bytes] = {}
        for signed in statements:
            statement: Encapsulations = unpack_body(Encapsulations, signed)
            v = statement.site
            public = self._terms.roster.get(v)
            valid = public is not None and verify(
                public, signed.signature, Encapsulations.LABEL, signed.body
            )
            if not valid:
                raise ProtocolError(Code.HANDSHAKE_SIGNATURE, f"Encapsulations of {v} are forged.")
            if statement.transcript != self.transcript:
                raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{v} is in another handshake.")
            digests[v] = statement.digests.get(self._site, b"")
        if set(digests) != {v for v in self.members if v < self._site}:
            raise ProtocolError(Code.HANDSHAKE_MEMBERS, "Encapsulations are missing.")
        return digests

    def unconfirmed(self, confirmations: Sequence[Signed]) -> str | None:
        """The first member whose tag does not match our pair key, or None."""
        if not self.keys and len(self.members) > 1:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Confirmations before the pair keys.")
        seen: set[str] = set()
        loser: str | None = None
        for signed in confirmations:
            confirm: Confirm = unpack_body(Confirm, signed)
            v = confirm.site
            public = self._terms.roster.get(v)
            if public is None or not verify(public, signed.signature, Confirm.LABEL, signed.body):
                raise ProtocolError(Code.HANDSHAKE_SIGNATURE, f"The confirmation of {v} is forged.")
            if v not in self.members:
                raise ProtocolError(Code.HANDSHAKE_MEMBERS, f"{v} is no member of this epoch.")
            if confirm.transcript != self.transcript:
                raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, f"{v} is in another handshake.")
            seen.add(v)
            if v != self._site and loser is None:
                expected = confirm_tag(self.keys[v], self.transcript, v, self._site)
                if confirm.tags.get(self._site) != expected:
                    loser = v
        if seen != set(self.members):
            raise ProtocolError(Code.HANDSHAKE_MEMBERS, "Confirmations are missing.")
        return loser

    def dispute(self, peer: str) -> Dispute:
        """Reveal this dead epoch's ephemeral keys, so that anyone can name the culprit."""
        if peer not in self.members:
            raise ProtocolError(Code.HANDSHAKE_MEMBERS, f"{peer} is no member of this epoch.")
        x25519_secret, mlkem_seed = self._ephemeral.reveal()
        return Dispute(self.transcript, self._site, peer, x25519_secret, mlkem_seed)

    def established(self) -> Established:
        """The statement that all pair keys are confirmed."""
        return Established(self.transcript, self._site)
