"""Key files: made on first use, for their owner only, refused where others may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from common.errors import Code, StorageError
from common.ports import Entropy
from common.world import write_durably

__all__ = ["MAX_KEY_FILE", "key_file", "secret_file"]

MAX_KEY_FILE: Final = 16 * 1024
_SEED_BYTES: Final = 32
_OTHERS: Final = 0o077


def key_file(path: Path) -> bytes:
    """The content of the key file at `path`.

    Raises:
        StorageError: KEY_FILE_OPEN where others than the owner may read or write it;
            KEY_FILE_DAMAGED where it is missing, no plain file, empty or too long.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise StorageError(
            Code.KEY_FILE_DAMAGED, f"{path}: cannot be read ({error.strerror})."
        ) from None
    try:
        mode = os.fstat(handle).st_mode  # of what was opened, not of what lies there by now
        if not stat.S_ISREG(mode):
            raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a plain file.")
        if mode & _OTHERS:
            raise StorageError(
                Code.KEY_FILE_OPEN, f"{path}: others than its owner may read this key."
            )
        content = os.read(handle, MAX_KEY_FILE + 1)
    finally:
        os.close(handle)
    if not 0 < len(content) <= MAX_KEY_FILE:
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key file of this software.")
    return content


def secret_file(path: Path, entropy: Entropy) -> bytes:
    """The 32 secret bytes in `path`, made on first use, readable by the owner only.

    Raises StorageError where the file is damaged or others may read it.
    """
    try:
        made = path.exists()
    except OSError as error:  # a folder that is another user's
        raise StorageError(
            Code.KEY_FILE_DAMAGED, f"{path}: cannot be read ({error.strerror})."
        ) from None
    if not made:
        write_durably(path, [entropy.take(_SEED_BYTES)])
    secret = key_file(path)
    if len(secret) != _SEED_BYTES:
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key file of this software.")
    return secret
