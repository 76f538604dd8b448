"""Whether the program that runs is the program that was installed.

pip silently overwrites a package of the same name, and ours are called `common`, `client` and
`server`. So at start-up each process compares its installed files with the wheel's RECORD and
makes sure that nobody else owns those names or is found before them.

Limits: this finds accidents, strangers and careless tampering. Whoever may write to the
installation may also rewrite this file, or the compiled copies in `__pycache__`, which are not
read here; signed images and read-only mounts are the answer to that.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackagePath, distributions
from pathlib import Path
from typing import Final, Literal

from common.crypto import labels
from common.crypto.digest import digest
from common.errors import Code, RefusedError

__all__ = ["DISTRIBUTION", "Integrity", "code_digest", "verify"]

DISTRIBUTION: Final = "wardround"
_EXECUTABLE: Final = {".py", ".pyc", ".so", ".pyd", ".pth"}


@dataclass(frozen=True)
class Integrity:
    """The outcome: `verified` with the number of files, or a `development` install."""

    status: Literal["verified", "development"]
    files: int
    version: str | None


def verify(packages: Sequence[str], *, search: Sequence[str] | None = None) -> Integrity:
    """Hold the installed files of `packages` against the wheel's RECORD.

    Args:
        packages: `common` and the role's own; a role that is not installed is not asked for.
        search: where to look instead of `sys.path`; for tests.

    Guarantee: returns `verified` only if every recorded file has its recorded digest, no
    executable file is extra, no other distribution has a file under these names, and the
    import system finds exactly these folders. An editable or uninstalled checkout cannot be
    checked and is reported as `development`.

    Raises:
        RefusedError: CODE_ALTERED or CODE_SHADOWED.
    """
    installed = list(distributions(path=list(search)) if search is not None else distributions())
    ours = next((d for d in installed if _is_ours(d)), None)
    if ours is None or _is_editable(ours):
        return Integrity("development", 0, None if ours is None else ours.version)
    _no_strangers(installed, packages)
    checked = 0
    for package in packages:
        home = Path(str(ours.locate_file(package)))
        _found_first(package, home, search)
        checked += _compare(ours, package, home)
    return Integrity("verified", checked, ours.version)


def code_digest(packages: Sequence[str], *, search: Sequence[str] | None = None) -> bytes:
    """What the program hashes to: names and contents of every file that may run.

    A wheel and a checkout of one release have the same digest, wherever they lie: it is what a
    hospital approves, and what it compares before it trains. Compiled copies are not read.

    Args:
        packages: `common` and the role's own.
        search: where to look instead of `sys.path`; for tests.

    Raises:
        RefusedError: CODE_ALTERED, where a package or a file of it cannot be read.
    """
    found: dict[str, bytes] = {}
    for package in packages:
        spec = PathFinder.find_spec(package, None if search is None else list(search))
        if spec is None or spec.origin is None:
            raise RefusedError(Code.CODE_ALTERED, f"The package {package} is not installed.")
        home = Path(spec.origin).parent
        for path in _executables(home):
            name = f"{package}/{path.relative_to(home).as_posix()}"
            try:
                found[name] = hashlib.sha256(path.read_bytes()).digest()
            except OSError:
                message = f"The file {name!a} cannot be read."
                raise RefusedError(Code.CODE_ALTERED, message) from None
    return digest(labels.CODE, found)


def _is_ours(distribution: Distribution) -> bool:
    return str(distribution.metadata["Name"]).lower() == DISTRIBUTION


def _is_editable(distribution: Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    return text is not None and bool(json.loads(text).get("dir_info", {}).get("editable"))


def _no_strangers(installed: Iterable[Distribution], packages: Sequence[str]) -> None:
    """Nobody else may own one of our top-level names."""
    for other in installed:
        taken = set() if _is_ours(other) else _top_levels(other).intersection(packages)
        if taken:
            raise RefusedError(
                Code.CODE_SHADOWED,
                f"The distribution {_name(other)} also owns the name {min(taken)}.",
            )


def _top_levels(distribution: Distribution) -> set[str]:
    """Top-level names of a distribution, by its files (what `packages_distributions` reads)."""
    named = (distribution.read_text("top_level.txt") or "").split()
    files = {path.parts[0].removesuffix(".py") for path in distribution.files or () if path.parts}
    return {*named, *files}


def _name(distribution: Distribution) -> str:
    name = str(distribution.metadata["Name"])
    return name if name.isprintable() and len(name) <= 100 else "without a usable name"  # noqa: PLR2004


def _found_first(package: str, home: Path, search: Sequence[str] | None) -> None:
    """The import system must find our folder, not one that lies earlier on the path."""
    spec = PathFinder.find_spec(package, None if search is None else list(search))
    origin = None if spec is None or spec.origin is None else Path(spec.origin)
    if origin is None:
        raise RefusedError(Code.CODE_ALTERED, f"The package {package} is not installed.")
    if origin.resolve() != (home / "__init__.py").resolve():
        raise RefusedError(
            Code.CODE_SHADOWED, f"The name {package} is found in another place before ours."
        )


def _compare(ours: Distribution, package: str, home: Path) -> int:
    """Files of one package that agree with RECORD."""
    recorded = {str(path): path for path in ours.files or () if path.parts[0] == package}
    if not recorded:
        raise RefusedError(Code.CODE_ALTERED, f"The package {package} is not in the RECORD.")
    count = 0
    for name, path in recorded.items():
        if "__pycache__" in path.parts:
            continue
        if not _agrees(path):
            raise RefusedError(Code.CODE_ALTERED, f"The file {name} is altered or missing.")
        count += 1
    for extra in _executables(home):
        name = f"{package}/{extra.relative_to(home).as_posix()}"
        if name not in recorded:
            raise RefusedError(Code.CODE_ALTERED, f"The file {name!a} is not ours.")
    return count


def _agrees(path: PackagePath) -> bool:
    """Whether a file has the digest that RECORD gives it; no digest is no agreement."""
    if path.hash is None or path.hash.mode != "sha256":
        return False
    try:
        content = Path(str(path.locate())).read_bytes()
    except OSError:
        return False
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return digest == path.hash.value


def _executables(home: Path) -> Iterator[Path]:
    """Files the import system might run, outside `__pycache__`."""
    for path in sorted(home.rglob("*")):
        if path.suffix in _EXECUTABLE and "__pycache__" not in path.parts:
            yield path
