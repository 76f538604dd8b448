# ruff: noqa: INP001 - a script, not a package
"""Writes the wheel of one role: `common` and the role's own package, and nothing of the other.

    python docker/wheel.py client dist/client
    python docker/wheel.py server dist/server

An image of a hospital must not hold the coordinator's code, and the other way round. The wheel
has the project's own name, version and metadata and a RECORD of exactly what is in it, so that
`wardround doctor` and every start compare the installed files with it. The files are those of
the whole release: the digest of the code that a hospital approves is the same.

Standard library only: building an image needs no build backend. The same sources give the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
ROLES: Final = ("client", "server")
EPOCH: Final = (2020, 2, 2, 0, 0, 0)
_TAG: Final = "py3-none-any"
_SKIPPED: Final = {"__pycache__"}
_FILE_MODE: Final = 0o100644 << 16


def files_of(root: Path, role: str) -> dict[str, bytes]:
    """Name in the wheel -> content, of every file of the role's packages."""
    found: dict[str, bytes] = {}
    for package in ("common", role):
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and not _SKIPPED.intersection(path.parts):
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def metadata_of(project: dict[str, Any], role: str) -> str:
    """The METADATA of the release with the extra of the role, if it has one."""
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        *(f"Classifier: {name}" for name in project["classifiers"]),
        f"Requires-Python: {_sorted(project['requires-python'])}",
        *(f"Requires-Dist: {need}" for need in _needs(project["dependencies"])),
    ]
    extra = project["optional-dependencies"].get(role)
    if extra is not None:
        lines.append(f"Provides-Extra: {role}")
        lines += [f"Requires-Dist: {need}; extra == '{role}'" for need in _needs(extra)]
    return "\n".join(lines) + "\n"


def _needs(written: list[str]) -> Iterator[str]:
    for need in sorted(written, key=str.lower):
        found = re.fullmatch(r"([\w.-]+)(\[[\w,]+\])?\s*(.*)", need)
        if found is None:
            raise ValueError(f"not a requirement: {need}")
        name, extras, bounds = found.groups()
        yield f"{name.lower().replace('_', '-')}{extras or ''}{_sorted(bounds)}"


def _sorted(bounds: str) -> str:
    return ",".join(sorted(part.strip() for part in bounds.split(",")))


def build(root: Path, role: str, out: Path) -> Path:
    """Write the role's wheel into the folder `out` and return its path."""
    if role not in ROLES:
        raise ValueError(f"a role is one of {', '.join(ROLES)}, not {role}")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stem = f"{project['name']}-{project['version']}"
    info = f"{stem}.dist-info"
    scripts = "".join(f"{name} = {target}\n" for name, target in project["scripts"].items())
    files = files_of(root, role)
    files[f"{info}/METADATA"] = metadata_of(project, role).encode()
    wheel = f"Wheel-Version: 1.0\nGenerator: wardround\nRoot-Is-Purelib: true\nTag: {_TAG}\n"
    files[f"{info}/WHEEL"] = wheel.encode()
    files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}".encode()
    record = f"{info}/RECORD"
    rows = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[record] = "".join(f"{row}\n" for row in [*rows, f"{record},,"]).encode()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{stem}-{_TAG}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = _FILE_MODE
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def main(arguments: list[str]) -> int:
    """The command line: a role and a folder."""
    if len(arguments) != 2 or arguments[0] not in ROLES:  # noqa: PLR2004 - ROLE and FOLDER
        sys.stderr.write("usage: wheel.py client|server FOLDER\n")
        return 2
    sys.stdout.write(f"{build(ROOT, arguments[0], Path(arguments[1]))}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
