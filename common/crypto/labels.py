"""Every domain-separation label, once.

A label is the first part of everything that is hashed, expanded or signed, so that no
digest, key or signature made for one purpose is ever valid for another.
"""

from __future__ import annotations

from typing import Final

# ---- encoding and digests
TREE: Final = "wardround/v1/tree"
TENSORS: Final = "wardround/v1/tensors"

# ---- identity and key agreement
FINGERPRINT: Final = "wardround/v1/fingerprint"
PAIR_KEY: Final = "wardround/v1/pair-key"

# ---- mask streams
SELF_STREAM: Final = "wardround/v1/self-stream"
PAIR_STREAM: Final = "wardround/v1/pair-stream"

# ---- handshake
RUN_KEY: Final = "wardround/v1/run-key"
ENCAPSULATIONS: Final = "wardround/v1/encapsulations"
CIPHERTEXT: Final = "wardround/v1/ciphertext"
HANDSHAKE: Final = "wardround/v1/handshake"
CONFIRM: Final = "wardround/v1/confirm"
CONFIRM_TAG: Final = "wardround/v1/confirm-tag"
ESTABLISHED: Final = "wardround/v1/established"
DISPUTE: Final = "wardround/v1/dispute"

# ---- deployment
ENVELOPE: Final = "wardround/v1/envelope"
OFFER: Final = "wardround/v1/offer"
INVITE: Final = "wardround/v1/invite"
JOIN: Final = "wardround/v1/join"
APPROVAL: Final = "wardround/v1/approval"
CODE: Final = "wardround/v1/code"

# ---- round
STUDY: Final = "wardround/v1/study"
HEADER: Final = "wardround/v1/header"
HEAD: Final = "wardround/v1/head"
READY: Final = "wardround/v1/ready"
RATCHET: Final = "wardround/v1/ratchet"
ROUND_SEED: Final = "wardround/v1/round-seed"
PAIR_TAG: Final = "wardround/v1/pair-tag"
BLOB: Final = "wardround/v1/blob"
BLOB_KEY: Final = "wardround/v1/blob-key"
SHARE_KEY: Final = "wardround/v1/share-key"
SHARE_SELF: Final = "wardround/v1/share-self"
SHARE_RECOVERY: Final = "wardround/v1/share-recovery"
SEALED_SHARES: Final = "wardround/v1/sealed-shares"
SELF_COMMITMENT: Final = "wardround/v1/self-commitment"
RECOVERY_COMMITMENT: Final = "wardround/v1/recovery-commitment"
PARTICIPANTS: Final = "wardround/v1/participants"
ROOT: Final = "wardround/v1/root"
UPLOAD: Final = "wardround/v1/upload"
SURVIVORS: Final = "wardround/v1/survivors"
AGREE: Final = "wardround/v1/agree"
UNMASK: Final = "wardround/v1/unmask"
COMMIT: Final = "wardround/v1/commit"
ATTEMPT: Final = "wardround/v1/attempt"
BURN: Final = "wardround/v1/burn"
HELLO: Final = "wardround/v1/hello"
REFUSAL: Final = "wardround/v1/refusal"
