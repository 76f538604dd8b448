"""A second, slow implementation of docs/PROTOCOL.md, for checking recorded runs.

It shares no code with the packages and no array library: Python's integers and fractions, SHA-256,
HMAC, and from `cryptography` the primitives Ed25519, X25519, ML-KEM-768, AES-GCM and AES-CTR alone.
`check(run)` raises `WrongError` (or what a primitive raises) unless every recorded byte is the one that
the protocol calls for; coordinators' messages are built anew and compared whole.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import struct
from fractions import Fraction

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

P = 2**256 + 297
ZERO = bytes(32)


class WrongError(Exception):
    """A recorded value is not what the protocol calls for."""


def must(condition: bool, what: str) -> None:
    if not condition:
        raise WrongError(what)


# ------------------------------------------------------------------------------- encoding
def size8(number: int) -> bytes:
    return number.to_bytes(8, "big")


def enc(value) -> bytes:
    if isinstance(value, bytes):
        return b"b" + size8(len(value)) + value
    if isinstance(value, str):
        return b"s" + size8(len(value.encode())) + value.encode()
    if isinstance(value, int):
        return b"i" + (value % 2**128).to_bytes(16, "big")
    if isinstance(value, dict):
        rows = sorted((enc(key), enc(item)) for key, item in value.items())
        return b"d" + size8(len(rows)) + b"".join(key + item for key, item in rows)
    return b"l" + size8(len(value)) + b"".join(enc(item) for item in value)


def dec(data: bytes):
    value, end = dec_at(data, 0)
    must(end == len(data) and enc(value) == data, "a message is not canonical")
    return value


def dec_at(data: bytes, at: int):
    kind, count = data[at : at + 1], int.from_bytes(data[at + 1 : at + 9], "big")
    start = at + 9
    if kind == b"i":
        return int.from_bytes(data[at + 1 : at + 17], "big", signed=True), at + 17
    if kind in (b"b", b"s"):
        must(start + count <= len(data), "a message is cut short")
        raw = data[start : start + count]
        return (raw if kind == b"b" else raw.decode()), start + count
    must(kind in (b"l", b"d") and count <= len(data), "a message has an unknown type")
    items = []
    for _ in range(count if kind == b"l" else 2 * count):
        item, start = dec_at(data, start)
        items.append(item)
    return (
        tuple(items) if kind == b"l" else dict(zip(items[::2], items[1::2], strict=True))
    ), start


# ------------------------------------------------------------------------ hashes and keys
def h(label: str, *parts) -> bytes:
    return hashlib.sha256(enc(("wardround/v1/" + label, *parts))).digest()


def hkdf(key: bytes, info: bytes, length: int = 32) -> bytes:
    output, block, counter = b"", b"", 0
    while len(output) < length:
        counter += 1
        block = hmac.new(key, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block
    return output[:length]


def expand(key: bytes, label: str, *parts, length: int = 32) -> bytes:
    return hkdf(key, enc(("wardround/v1/" + label, *parts)), length)


def signed(public: bytes, label: str, body: bytes, signature: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(public).verify(
        signature, enc(("wardround/v1/" + label, body))
    )


def tree(planes: list[bytes]) -> bytes:
    chunk = 4 << 20
    leaves = [
        b"".join(hashlib.sha256(p[i : i + chunk]).digest() for i in range(0, len(p), chunk))
        for p in planes
    ]
    return h("tree", [(len(p), leaf) for p, leaf in zip(planes, leaves, strict=True)])


def combine(shares: dict[int, bytes]) -> bytes:
    total = 0
    for x, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != x:
                above, below = above * other % P, below * (other - x) % P
        total += int.from_bytes(share, "big") * above * pow(below, -1, P)
    return (total % P).to_bytes(32, "big")


# ----------------------------------------------------------------------------- arithmetic
def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def unpack_f32(raw: str) -> list[float]:
    data = bytes.fromhex(raw)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def quantised(value: float, weight: float, exponent: int, limit: int) -> int:
    scaled = f32(f32(value * weight) * 2.0**exponent)
    return max(-limit, min(limit, round(scaled)))  # Python rounds ties to even


def stream(key: bytes, count: int, width: int) -> list[int]:
    raw = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(count * width))
    return [int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width)]


def planes_of(words: list[int], bits: int) -> list[bytes]:
    if bits == 24:
        low = b"".join((w % 2**16).to_bytes(2, "little") for w in words)
        return [low, bytes(w >> 16 & 255 for w in words)]
    return [b"".join((w % 2**bits).to_bytes(bits // 8, "little") for w in words)]


def words_of(planes: list[bytes], bits: int) -> list[int]:
    if bits == 24:
        low = [int.from_bytes(planes[0][i : i + 2], "little") for i in range(0, len(planes[0]), 2)]
        return [a + (b << 16) for a, b in zip(low, planes[1], strict=True)]
    step = bits // 8
    return [
        int.from_bytes(planes[0][i : i + step], "little") for i in range(0, len(planes[0]), step)
    ]


def centred(word: int, bits: int) -> int:
    return (word + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def floor_log2(value: Fraction) -> int:
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= value:
        exponent += 1
    while Fraction(2) ** exponent > value:
        exponent -= 1
    return exponent


# ------------------------------------------------------------------------------ the check
def check(run: dict) -> None:
    """Raise unless the whole recorded run is right."""
    Run(run).check()


def expanded(run: dict) -> list[list]:
    """The messages with their quoted pieces put back."""
    pieces = list(run["pieces"])

    def full(text: str) -> str:
        return re.sub(r"\{(\d+)\}", lambda match: pieces[int(match[1])], text)

    for index in reversed(range(len(pieces))):
        pieces[index] = full(pieces[index])
    return [[sender, recipient, full(text)] for sender, recipient, text in run["messages"]]


class Run:
    def __init__(self, run: dict) -> None:
        self.bits, self.secrets, self.derived, self.inputs = (
            run[name] for name in ("bits", "secrets", "derived", "inputs")
        )
        terms = self.terms = run["terms"]
        self.study = bytes.fromhex(terms["study"])
        self.roster = {s: bytes.fromhex(k) for s, k in terms["roster"].items()}
        self.sites, self.quorum = sorted(self.roster), terms["quorum"]
        self.weights = {s: float.fromhex(w) for s, w in terms["weights"].items()}
        self.sizes = [math.prod(shape) for _, shape in terms["layout"]]
        must(self.quorum == max((len(self.sites) + 1) // 2 + 1, 3), "the quorum")  # c = 1
        self.log: dict[tuple[str, str], list] = {}
        for sender, recipient, text in run["messages"]:
            tag, *fields = dec(bytes.fromhex(text))
            party = recipient if sender == "coordinator" else sender
            must("coordinator" in (sender, recipient) and party in self.roster, "a party")
            self.log.setdefault((tag, party), []).append(tuple(fields))
        self.state = {n: [shape, unpack_f32(v)] for n, (shape, v) in terms["initial"].items()}
        self.exponents = tuple(terms["exponents"])
        self.features = terms.get("features", 0)
        self.prev, self.link, self.burns, self.epoch = ZERO, (), (), 0

    def told(self, tag: str, site: str, *fields) -> None:
        """The next message of this kind to or from a site; lost answers are asked for again."""
        log = self.log.get((tag, site), [])
        must(bool(log) and log[0] == fields, f"{tag} of {site}")
        while log and log[0] == fields:
            log.pop(0)

    def said(self, tag: str, label: str, site: str) -> tuple[tuple, tuple]:
        """A site's next statement: its fields, and (body, signature)."""
        body, signature = statement = self.log[tag, site][0]
        signed(self.roster[site], label, body, signature)
        self.told(tag, site, *statement)
        return dec(body), statement

    def check(self) -> None:
        for site in self.sites:
            hello, _ = self.said("Hello", "hello", site)
            must(hello == (self.study, site, 0, 0, 0), "a hello")
        self.members = self.sites
        while convicted := self.handshake():
            self.members = [site for site in self.members if site != convicted]
            must(len(self.members) >= self.quorum, "an epoch below the quorum")
        must(self.epoch == len(self.derived.get("epochs", [0])), "the number of epochs")
        number, turn = 0, 0 if self.features else 1
        completed = iter(self.derived["rounds"])
        while turn <= self.terms["turns"] + 1:
            number += 1
            turn += Round(self, number, turn).check(completed)
        must(next(completed, None) is None, "a round that was not played")
        for site in self.sites:
            self.told("Finished", site, self.study, self.run, (self.link,), ())
        must(not any(self.log.values()), "a message that the protocol has no place for")
        must(self.digest().hex() == self.derived["final"], "the final state")

    def digest(self) -> bytes:
        return h("tensors", {
            name: ("<f4", shape, hashlib.sha256(struct.pack(f"<{len(v)}f", *v)).digest())
            for name, (shape, v) in self.state.items()
        })  # fmt: skip

    # -------------------------------------------------------------------------- handshake
    def handshake(self) -> str | None:
        """One epoch among the members; the member that its dispute convicts, if there is one."""
        members = self.members
        secrets, derived = (
            part["epochs"][self.epoch] if "epochs" in part else part
            for part in (self.secrets, self.derived)
        )
        self.epoch += 1
        self.run = self.log["HandshakeOpen", members[0]][0][1]
        must(len(self.run) == 32, "the run id")
        x25519 = {s: bytes.fromhex(secrets["x25519"][s]) for s in members}
        kem = {
            s: MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(secrets["mlkem_seed"][s]))
            for s in members
        }
        publics, keys = {}, []
        for s in members:
            self.told("HandshakeOpen", s, self.study, self.run, self.epoch, tuple(members))
            publics[s] = X25519PrivateKey.from_private_bytes(x25519[s]).public_key()
            said, statement = self.said("RunKey", "run-key", s)
            raw = publics[s].public_bytes_raw(), kem[s].public_key().public_bytes_raw()
            must(
                said[:6] == (self.study, self.run, self.epoch, s, *raw) and len(said[6]) == 32,
                "a run key",
            )
            keys.append(statement)
        self.rt = h("handshake", self.study, self.run, self.epoch, [body for body, _ in keys])
        must(self.rt.hex() == derived["rt"], "rt")
        statements, sent = {}, {}
        for u in members:
            self.told("RunKeys", u, self.epoch, tuple(keys))
            statement, sent[u] = self.log["EncapsulationUpload", u][0]
            self.told("EncapsulationUpload", u, statement, sent[u])
            signed(self.roster[u], "encapsulations", *statement)
            digests = {v: h("ciphertext", sent[u][v]) for v in members if v > u}
            must(dec(statement[0]) == (self.rt, u, digests) and set(sent[u]) == set(digests), "cts")
            statements[u] = statement
        self.keys = {}
        for v in members:
            for u in (s for s in members if s < v):
                shared = kem[v].decapsulate(sent[u][v])
                must(shared.hex() == secrets["mlkem_shared"][f"{u} {v}"], "a shared secret")
                secret = X25519PrivateKey.from_private_bytes(x25519[v]).exchange(
                    X25519PublicKey.from_public_bytes(publics[u].public_bytes_raw())
                )
                extracted = hmac.new(self.rt, secret + shared, hashlib.sha256).digest()
                info = enc(("wardround/v1/pair-key", u, v, hashlib.sha256(sent[u][v]).digest()))
                self.keys[u, v] = self.keys[v, u] = hkdf(extracted, info)
                must(self.keys[u, v].hex() == derived["pair_keys"][f"{u} {v}"], "a pair key")
        self.ratchet = 0
        for v in members:
            earlier = [u for u in members if u < v]
            self.told(
                "EncapsulationSet", v, self.rt, tuple(statements[u] for u in earlier),
                {u: sent[u][v] for u in earlier},
            )  # fmt: skip
        return self.confirmed(
            {s: (x25519[s], bytes.fromhex(secrets["mlkem_seed"][s])) for s in members}
        )

    def confirmed(self, reveals: dict[str, tuple[bytes, bytes]]) -> str | None:
        """Everybody's tags; who is convicted by the disputes that wrong ones bring."""
        confirmations, shown, wrong = [], {}, []
        for v in self.members:
            said, statement = self.said("Confirm", "confirm", v)
            must(said[:2] == (self.rt, v) and set(said[2]) == set(self.members) - {v}, "tags")
            shown[v] = said[2]
            confirmations.append(statement)
        for v in self.members:
            for u in (s for s in self.members if s != v):
                tag = expand(self.keys[v, u], "confirm-tag", self.rt, v, u, length=16)
                if shown[v][u] != tag:
                    wrong.append((v, u))
        must(len(wrong) <= 1, "more than one wrong confirmation")
        for v in self.members:
            self.told("ConfirmSet", v, self.rt, tuple(confirmations))
            if v not in [receiver for _, receiver in wrong]:
                must(self.said("Established", "established", v)[0] == (self.rt, v), "established")
        if not wrong:
            return None
        culprit, victim = wrong[0]
        # The later one of a pair holds the ML-KEM key: its reveal rebuilds the pair's key.
        later = max(culprit, victim)
        if later != victim:
            self.told("RevealRequest", later, self.rt, victim)
        for site, peer in {victim: culprit, later: min(culprit, victim)}.items():
            said, _ = self.said("Dispute", "dispute", site)
            must(said == (self.rt, site, peer, *reveals[site]), "a reveal")
        return culprit  # the revealed keys and the ciphertext fit: its tag alone is wrong

    def ratcheted(self, number: int) -> dict[tuple[str, str], bytes]:
        while self.ratchet < number:
            at, self.ratchet = self.ratchet, self.ratchet + 1
            self.keys = {pair: expand(k, "ratchet", at) for pair, k in self.keys.items()}
        return self.keys


class Round:
    def __init__(self, run: Run, number: int, turn: int) -> None:
        self.run, self.number, self.sites = run, number, run.members
        self.trains = 1 <= turn <= run.terms["turns"]
        self.kind = "train" if self.trains else "evaluate" if turn else "statistics"
        self.lanes = []
        if self.trains:
            self.lanes.append((0, run.bits, sum(run.sizes)))
        if turn > 1:
            self.lanes.append((1, 64, run.terms["metric_words"]))
        if turn == 0:
            self.lanes.append((2, 64, 3 * run.features))
        self.header = (
            run.study, run.run, run.rt, number, self.kind, turn,
            run.digest(), run.prev, tuple(self.lanes), run.exponents,
        )  # fmt: skip
        self.hh = h("header", *self.header)
        self.keys = run.ratcheted(number)
        self.limit = (2 ** (run.bits - 1) - 1) // len(run.sites)

    def same(self, name: str, value: bytes) -> None:
        must(value.hex() == self.derived[name], name)

    def check(self, completed) -> int:
        """1 where the round gave an aggregate, 0 where it was burned."""
        run = self.run
        start = (
            run.study, run.run, run.epoch, self.number, self.kind, run.link and (run.link,), (),
            run.burns,
        )  # fmt: skip
        for s in self.sites:
            run.told("RoundStart", s, *start)
        self.ready()
        self.uploads()
        request = (run.study, run.run, self.number)
        if (run.log.get(("BurnRequest", run.sites[0])) or [()])[0] == request:
            self.burn(request)
            return 0
        self.derived = next(completed)
        self.same("hh", self.hh)
        self.same("uh1", self.uh1)
        must(self.derived["uploads"] == self.recorded, "an upload")
        self.agree()
        self.unmask()
        return 1

    def burn(self, request: tuple) -> None:
        """Q parties swear that they never agree in this round: its number is used up."""
        run, said = self.run, {}
        for s in run.sites:
            run.told("BurnRequest", s, *request)
            if run.log.get(("Burn", s)):
                body, said[s] = run.said("Burn", "burn", s)
                must(body == (*request, s), "a burn")
        *_, shown = run.log["RoundStart", self.sites[0]][0]
        new = shown[len(run.burns) :]
        signers = [dec(body)[3] for body, _ in new]
        must(len(set(signers)) >= run.quorum and signers == sorted(signers), "a burn certificate")
        must(new == tuple(said[s] for s in signers), "a burn certificate's statements")
        run.burns += new

    # ------------------------------------------------------------------------------ ready
    def ready(self) -> None:
        run = self.run
        self.heads, self.statements, self.blobs, sealed = {}, {}, {}, {}
        for s in self.sites:
            statement, self.blobs[s], sealed[s] = run.log["Ready", s][0]
            run.told("Ready", s, statement, self.blobs[s], sealed[s])
            signed(run.roster[s], "ready", *statement)
            self.heads[s], self.statements[s] = dec(statement[0]), statement
        self.digests = {s: h("head", self.statements[s][0]) for s in self.sites}
        self.uh1 = h("participants", self.hh, self.digests)
        for s in self.sites:
            shares = {v: sealed[v][s] for v in self.sites if v != s}
            run.told("Participants", s, self.number, tuple(self.statements.values()), shares)
        self.opened = {}
        for u in self.sites:
            head = self.heads[u]
            must(
                head[:3] == (self.hh, self.number, u) and head[5] == h("blob", self.blobs[u]),
                "head",
            )
            ledger = run.inputs[str(self.number)][u]["ledger"]
            must(len(head) == 11 and len(head[6]) == 32, "a head's nonce")
            must(head[9] == (ledger[0], bytes.fromhex(ledger[1])), "a ledger's position")
            before = run.inputs.get(str(self.number - 1), {})
            seen = {v: (x["ledger"][0], bytes.fromhex(x["ledger"][1])) for v, x in before.items()}
            must(head[10] == {v: w for v, w in seen.items() if v != u}, "a witness")
            must(set(head[8]) == set(sealed[u]) == set(self.sites) - {u}, "a head's pairs")
            for v, ciphertext in sealed[u].items():
                key = expand(self.keys[u, v], "share-key", self.hh, u, v, head[3], head[4])
                plain = AESGCM(key).decrypt(bytes(12), ciphertext, enc((self.hh, u, v)))
                tag = expand(self.seed(u, v), "pair-tag", length=16)
                promised = tag + h("sealed-shares", ciphertext) + self.commitments(u, v, plain)
                must(head[8][v] == promised, "what a head says of a peer")
                self.opened[u, v] = plain

    def seed(self, u: str, v: str) -> bytes:
        return expand(self.keys[u, v], "round-seed", self.hh)

    def commitments(self, dealer: str, holder: str, plain: bytes) -> bytes:
        parts = plain[:33] + plain[66:82], plain[33:66] + plain[82:98]
        return b"".join(
            h(label, self.hh, dealer, holder, part)
            for label, part in zip(("share-self", "share-recovery"), parts, strict=True)
        )

    def rebuilt(self, dealer: str, where: slice) -> bytes:
        """A dealer's secret, from what the other sites hold."""
        holders = [v for v in self.sites if v != dealer][: self.run.quorum]
        points = {v: self.run.sites.index(v) + 1 for v in holders}
        return combine({points[v]: self.opened[dealer, v][where] for v in holders})

    # ---------------------------------------------------------------------------- uploads
    def uploads(self) -> None:
        run = self.run
        self.plain, self.roots, self.sent, self.receipts = {}, {}, {}, {}
        self.recorded = {}
        for u in self.sites:
            secret = self.rebuilt(u, slice(0, 33))
            if "self" in run.secrets:
                must(secret.hex() == run.secrets["self"][f"{self.number} {u}"], "a self secret")
            must(h("self-commitment", self.hh, u, secret) == self.heads[u][3], "a commitment")
            recovery = self.rebuilt(u, slice(33, 66))
            must(h("recovery-commitment", self.hh, u, recovery) == self.heads[u][4], "a commitment")
            key = expand(recovery, "blob-key", self.hh, u)
            seeds = b"".join(self.seed(u, v) for v in self.sites if v != u)
            must(
                AESGCM(key).encrypt(bytes(12), seeds, enc((self.hh, u))) == self.blobs[u], "a blob"
            )
            masks = [(1, secret, "self-stream")]
            masks += [
                (1 if u < v else -1, self.seed(u, v), "pair-stream") for v in self.sites if v != u
            ]
            planes, trees = [], []
            for lane, words in zip(self.lanes, self.words(u), strict=True):
                self.plain[u, lane] = words
                masked = planes_of(self.add(words, masks, lane), lane[1])
                planes += masked
                trees.append((*lane, tree(masked)))
            self.roots[u] = h("root", trees)
            body, signature = statement = run.log["Upload", u][0][0]
            run.told("Upload", u, statement, tuple(planes))
            signed(run.roster[u], "upload", body, signature)
            must(dec(body) == (self.uh1, u, self.roots[u]), "a receipt")
            self.recorded[u] = [self.roots[u].hex(), *(plane[:16].hex() for plane in planes)]
            self.sent[u], self.receipts[u] = planes, statement

    def words(self, u: str) -> list[list[int]]:
        """A site's lanes before masking."""
        run, given = self.run, self.run.inputs[str(self.number)][u]
        lanes = []
        if self.trains:
            grid = [e for e, n in zip(run.exponents, run.sizes, strict=True) for _ in range(n)]
            update = zip(unpack_f32(given["update"]), grid, strict=True)
            lanes.append([quantised(x, f32(run.weights[u]), e, self.limit) for x, e in update])
        if self.lanes[-1][0] == 1:
            lanes.append(given["metrics"])
        if self.lanes[-1][0] == 2:
            lanes.append(given["statistics"])
        return lanes

    def add(self, words: list[int], masks: list, lane: tuple[int, int, int]) -> list[int]:
        """The words with these masks added, modulo the lane's ring."""
        _, bits, length = lane
        total = list(words)
        for sign, secret, label in masks:
            key = expand(secret, label, *lane, self.uh1)
            mask = stream(key, length, 8 if bits == 64 else 4)
            total = [w + sign * m for w, m in zip(total, mask, strict=True)]
        return [w % 2**bits for w in total]

    # -------------------------------------------------------------------- agree and unmask
    def agree(self) -> None:
        run = self.run
        _, receipts = run.log["Survivors", self.sites[0]][0]
        self.survivors = [dec(body)[1] for body, _ in receipts]
        expected = tuple(self.receipts[s] for s in self.survivors)
        must(len(expected) >= run.quorum and self.survivors == sorted(set(self.survivors)), "U2")
        self.uh2 = h("survivors", self.uh1, {s: self.roots[s] for s in self.survivors})
        self.same("uh2", self.uh2)
        said = {}
        for s in self.survivors:
            run.told("Survivors", s, self.number, expected)
            body, said[s] = run.said("Agree", "agree", s)
            must(body == (run.study, run.run, self.number, s, self.uh2), "an agreement")
        _, self.agreements = run.log["Agreements", self.sites[0]][0]
        signers = [dec(body)[3] for body, _ in self.agreements]
        must(len(set(signers)) == run.quorum and signers == sorted(signers), "a certificate")
        must(self.agreements == tuple(said[s] for s in signers), "a certificate's statements")

    def unmask(self) -> None:
        run = self.run
        dropouts = [s for s in self.sites if s not in self.survivors]
        released: dict[str, tuple] = {}
        for s in self.survivors:
            if ("Agreements", s) not in run.log or not run.log["Agreements", s]:
                continue  # the sum was open before this one was asked
            run.told("Agreements", s, self.number, self.agreements)
            if not run.log.get(("Unmask", s)):
                continue
            body, _ = run.said("Unmask", "unmask", s)
            must(body[:2] == (self.uh2, s), "an answer")
            must(set(body[2]) == set(self.survivors) and set(body[3]) == set(dropouts), "shares")
            for part, label, kind in ((2, "share-self", 0), (3, "share-recovery", 1)):
                for dealer, salted in body[part].items():
                    head = self.heads[dealer]
                    if dealer == s:
                        promised = head[7][32 * kind : 32 * kind + 32]
                    else:
                        promised = head[8][s][48 + 32 * kind : 80 + 32 * kind]
                    must(h(label, self.hh, dealer, s, salted) == promised, "a released share")
            released[s] = body
        must(len(released) >= run.quorum, "too few answers")
        self.total(released, dropouts)

    def total(self, released: dict[str, tuple], dropouts: list[str]) -> None:
        """Open the sum with what was released, and nothing else."""
        run = self.run

        def secret(dealer: str, part: int) -> bytes:
            holders = sorted(released)[: run.quorum]
            return combine(
                {run.sites.index(v) + 1: released[v][part][dealer][:33] for v in holders}
            )

        masks = [(-1, secret(s, 2), "self-stream") for s in self.survivors]
        for v in dropouts:
            key = expand(secret(v, 3), "blob-key", self.hh, v)
            blob = AESGCM(key).decrypt(bytes(12), self.blobs[v], enc((self.hh, v)))
            peers = [s for s in self.sites if s != v]
            for index, s in enumerate(peers):
                if s in self.survivors:
                    masks.append(
                        (-1 if s < v else 1, blob[32 * index : 32 * index + 32], "pair-stream")
                    )
        sums, at = [], 0
        for lane in self.lanes:
            count = 2 if lane[1] == 24 else 1
            uploads = [words_of(self.sent[s][at : at + count], lane[1]) for s in self.survivors]
            at += count
            opened = self.add([sum(column) for column in zip(*uploads, strict=True)], masks, lane)
            bare = [
                sum(column)
                for column in zip(*(self.plain[s, lane] for s in self.survivors), strict=True)
            ]
            must(opened == [word % 2 ** lane[1] for word in bare], "the opened sum")
            sums.append(planes_of(opened, 64 if lane[1] == 64 else 32)[0])
            must([centred(word, lane[1]) for word in opened] == bare, "the sum wraps")
        must([words.hex() for words in sums] == self.derived["aggregate"], "the aggregate")
        self.close(tuple(sums))

    def close(self, sums: tuple[bytes, ...]) -> None:
        run = self.run
        run.prev = h("commit", self.uh2, [tree([words]) for words in sums])
        self.same("commit", run.prev)
        roots = {s: self.roots[s] for s in self.survivors}
        run.link, run.burns = (self.header, self.digests, roots, self.agreements, sums), ()
        if self.kind == "statistics":
            self.count([centred(word, 64) for word in words_of([sums[0]], 64)])
        if self.trains:
            self.step([centred(word, run.bits) for word in words_of([sums[0]], 32)])
        must(run.digest().hex() == self.derived["state"], "the state")
        must(list(run.exponents) == self.derived["exponents"], "the exponents")

    def step(self, total: list[int]) -> None:
        """The server optimiser on the mean update, and the next exponents."""
        run, at, following = self.run, 0, []
        weight = math.fsum(run.weights[s] for s in self.survivors)
        largest = Fraction(max(run.weights.values()))
        for (name, _), size, exponent in zip(
            run.terms["layout"], run.sizes, run.exponents, strict=True
        ):
            words = total[at : at + size]
            at += size
            mean = [f32(word / (weight * 2.0**exponent)) for word in words]
            self.optimize(name, mean)
            scale = 64 * largest / Fraction(weight) * Fraction(2) ** -exponent
            square = scale**2 * Fraction(sum(word * word for word in words), size)
            square = max(square, (Fraction(2) ** -12 * largest) ** 2)
            finest = floor_log2(Fraction(self.limit**2) / square) // 2
            following.append(max(-120, min(120, finest)))
        run.exponents = tuple(following)

    def optimize(self, name: str, mean: list[float]) -> None:
        """FedAvgM, or FedAdam: elementwise float32, every operation rounded by itself."""
        run, terms = self.run, self.run.terms
        model, first = run.state[name][1], run.state["optimizer/m/" + name][1]
        rate = f32(terms["learning_rate"])
        if "beta1" not in terms:
            momentum = f32(terms["momentum"])
            first[:] = [f32(f32(momentum * m) + x) for m, x in zip(first, mean, strict=True)]
            model[:] = [f32(x + f32(rate * m)) for x, m in zip(model, first, strict=True)]
            return
        second = run.state["optimizer/v/" + name][1]
        for slot, key, added in (
            (first, "beta1", mean),
            (second, "beta2", [f32(x * x) for x in mean]),
        ):
            kept, new = f32(terms[key]), f32(1.0 - terms[key])
            slot[:] = [f32(f32(kept * s) + f32(new * x)) for s, x in zip(slot, added, strict=True)]
        tau = f32(terms["tau"])
        steps = [
            f32(f32(rate * m) / f32(f32(math.sqrt(v)) + tau))
            for m, v in zip(first, second, strict=True)
        ]
        model[:] = [f32(x + step) for x, step in zip(model, steps, strict=True)]

    def count(self, total: list[int]) -> None:
        """Mean and deviation from the summed statistics; training leaves them as they are."""
        run = self.run
        features, noise = run.features, float.fromhex(run.terms["statistics_noise"])
        error = noise * math.sqrt(3 * features / 8) * math.sqrt(len(self.survivors))
        means, deviations = [], []
        for at in range(features):
            u, square, present = (word / 2**16 for word in total[at::features])
            p = 4 * present
            if p < max(1.0, 12 * error):
                means.append(0.5)
                deviations.append(0.5)
                continue
            c = max(-0.5, min(0.5, u / p))
            means.append(f32(c + 0.5))
            variance = max(square / p - c * c, error / p, 2.0**-12)
            deviations.append(f32(min(math.sqrt(variance), 0.5)))
        run.state["statistics/mean"][1][:] = means
        run.state["statistics/deviation"][1][:] = deviations
