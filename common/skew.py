"""How far two installed versions are apart, and the header that tells one side the other's."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["VERSION_HEADER", "far_apart"]

VERSION_HEADER: Final = "wardround-version"
"""On a coordinator's answers to a hospital that it knows; nothing is decided by it."""

_RELEASE: Final = re.compile(r"(\d{1,6})\.(\d{1,6})(?:\.\d{1,6})?")


def far_apart(own: str, other: str) -> bool:
    """Whether two releases are more than one minor version apart; a version that is none is.

    Guarantee: formats and messages carry a number of their own; releases within one minor version
    of each other write and read the same ones.
    """
    ours, theirs = _RELEASE.fullmatch(own), _RELEASE.fullmatch(other)
    if ours is None or theirs is None:
        return True
    return ours[1] != theirs[1] or abs(int(ours[2]) - int(theirs[2])) > 1
