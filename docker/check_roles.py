# ruff: noqa: INP001 - a script, not a package
"""Performs the images' install steps in fresh virtual environments and proves role separation.

    python docker/check_roles.py           # the coordinator really installed, the hospital quickly
    python docker/check_roles.py --full    # both really installed: gigabytes and minutes

Really installed: the same commands as in the Dockerfiles, from the same hashes. Quickly: the
hospital's wheel is really installed, and of what lies in the environment that runs this only the
distributions that requirements/client.txt locks can be imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
LOCKS: Final = {"client": "client", "server": "coordinator"}
OTHER: Final = {"client": "server", "server": "client"}
_SECONDS: Final = 1800

# An environment's interpreter asks this last: modules and metadata of what is locked, lent.
_GUARD: Final = """\
import sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder, MetadataPathFinder

LENT, MODULES, NAMES = {lent!r}, frozenset({modules!r}), frozenset({names!r})


class _Lender(DistributionFinder):
    def find_spec(self, name, path=None, target=None):
        if path is not None or name.partition(".")[0] not in MODULES:
            return None
        return PathFinder.find_spec(name, LENT)

    def find_distributions(self, context=DistributionFinder.Context()):
        if context.path is not sys.path and context.path != sys.path:
            return
        asked = DistributionFinder.Context(name=context.name, path=LENT)
        for found in MetadataPathFinder.find_distributions(asked):
            if found.metadata["Name"].lower().replace("_", "-").replace(".", "-") in NAMES:
                yield found


sys.meta_path.append(_Lender())
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment of one role."""

    role: str
    folder: Path
    real: bool

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Run its interpreter, away from the checkout."""
        return subprocess.run(
            [self.python, "-I", *words],
            cwd=self.folder,
            env=_plain_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )

    def faults(self, *without: str) -> list[str]:
        """What is wrong with the separation of roles here, beside the absent modules `without`."""
        done = self.run(ROOT / "docker" / "separation.py", self.role, *without)
        try:
            return list(json.loads(done.stdout.splitlines()[-1])["faults"])
        except (ValueError, KeyError, IndexError):
            return [f"separation.py ended with {done.returncode}: {done.stderr[-2000:]}"]

    def wardround(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the installed command."""
        return self.run(self.folder / "bin" / "wardround", *words)


def _plain_environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}


def _call(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_SECONDS)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def _pip(environment: Environment, *words: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", environment.python, "install", "--quiet")
    _call(*pip, "--disable-pip-version-check", *words)


def locked_names(lock: Path) -> set[str]:
    """The distributions that a lock file names, as metadata compares names."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==", lock.read_text(), re.MULTILINE)
    return {_normal(name) for name in found}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def prepare(role: str, folder: Path, *, real: bool) -> Environment:
    """Install one role into `folder` with the commands of its Dockerfile.

    Raises:
        RuntimeError: a step failed; the text says which.
    """
    environment = Environment(role, folder / "environment", real)
    _call(sys.executable, "-m", "venv", "--without-pip", environment.folder)
    lock = ROOT / "requirements" / f"{LOCKS[role]}.txt"
    if real:
        # Compiled copies are made in an image; here nothing would use them twice.
        wheels = ("--no-compile", "--require-hashes", "--only-binary", ":all:")
        _pip(environment, *wheels, "--requirement", lock)
    else:
        lend(environment, locked_names(lock))
    _call(sys.executable, ROOT / "docker" / "wheel.py", role, folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    _pip(environment, "--no-deps", "--no-index", wheel)
    return environment


def lend(environment: Environment, locked: set[str]) -> None:
    """Let `environment` import the locked distributions of the one that runs this, and no other."""
    from importlib.metadata import distributions

    modules: set[str] = set()
    places: set[str] = set()
    missing = set(locked)
    for found in distributions():
        name = _normal(str(found.metadata["Name"]))
        if name not in locked:
            continue
        missing.discard(name)
        places.add(str(found.locate_file("")))
        tops = {path.parts[0].partition(".")[0] for path in found.files or () if path.parts}
        modules |= {top for top in tops if top.isidentifier()}
    if len(missing) > len(locked) // 2:
        raise RuntimeError(f"not installed here: {', '.join(sorted(missing))}")
    (site,) = (environment.folder / "lib").glob("python*/site-packages")
    lent, names = sorted(places), sorted(locked)
    guard = _GUARD.format(lent=lent, modules=sorted(modules), names=names)
    (site / "_lent.py").write_text(guard, encoding="utf-8")
    (site / "lent.pth").write_text("import _lent\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check both roles and say what was found."""
    parser = argparse.ArgumentParser(description="prove that the roles are separate")
    parser.add_argument("--full", action="store_true", help="really install the hospital, too")
    full = parser.parse_args(arguments).full
    status = 0
    for role in ("server", "client"):
        with tempfile.TemporaryDirectory(prefix="wardround-roles-") as folder:
            real = full or role == "server"
            environment = prepare(role, Path(folder), real=real)
            found = environment.faults()
            how = "installed from the locked hashes" if real else "wheel installed, the rest lent"
            sys.stdout.write(f"{role} ({how}): {'separate' if not found else 'NOT SEPARATE'}\n")
            sys.stdout.writelines(f"  {fault}\n" for fault in found)
            status = max(status, 1 if found else 0)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
