"""Validated names: a `SiteId` is a hospital's name on the wire, in files and in logs."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NewType

SiteId = NewType("SiteId", str)

DIGEST_BYTES = 32
_SITE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@lru_cache(maxsize=4096)
def is_site_id(text: str) -> bool:
    """Whether `text` may name a site: 1 to 63 of a-z, 0-9 and inner hyphens."""
    return _SITE_ID.fullmatch(text) is not None


def short(digest: bytes) -> str:
    """The first 12 hex digits of a digest: enough for a person to compare in a log."""
    return digest[:6].hex()
