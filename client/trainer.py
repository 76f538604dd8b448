"""The trainer: one long-lived child process that sees records, torch and the GPU.

The daemon stays small and outlives it: a CUDA fault or an out-of-memory kill ends the child, the
hospital sits that round out, and the next round starts another. Model and GPU stay warm between
rounds.

The two speak frames over the child's standard input and output: a canonically encoded header,
then the arrays' bytes as they lie in memory, written from the sender's array and read into the
receiver's. Nothing is pickled, nothing secret is in arguments or environment, and what libraries
print goes to the child's log. Noise is drawn in the child, from the operating system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import site
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

import client
from client.knowledge.shelf import read_knowledge
from client.local import LocalFiles, divide
from client.privacy.ledger import HeldOutSplit
from common.bundle import Bundle
from common.crypto.digest import decode, encode, flat_view
from common.errors import Code, DataError, ProtocolError, RefusedError, StorageError, WardroundError
from common.ids import short
from common.integrity import code_digest
from common.metrics import scoring_of
from common.ports import Entropy, Tensors, Trainer
from common.statistics import DEVIATION, MEAN
from common.strategy import CORRECTION, released
from common.world import SystemEntropy

__all__ = ["PACKAGES", "TrainerProcess", "TrainerTask", "serve"]

PACKAGES: Final = ("common", "client")
"""What runs in a hospital, and is hashed into the code digest."""

COMMAND: Final = (sys.executable, "-P", "-m", "client.trainer")
MAX_HEADER: Final = 1 << 23
_HEAD: Final = struct.Struct(">4sIQ")
_MAGIC: Final = b"WRT1"
_KINDS: Final = frozenset({"<f4", "<i4", "<i8"})
_TICK_MS: Final = 200
_PIPE_BYTES: Final = 1 << 20
_LOG_BYTES: Final = 1 << 20
_PATIENCE_S: Final = 10.0
# Reading records and building a model may take longer than one round's training.
_OPENING_S: Final = 6 * 3600.0
_CODES: Final = {code.label: code for code in Code}

Arrays = Mapping[str, NDArray[Any]]
Header = Mapping[str, Any]


@dataclass(frozen=True)
class TrainerTask:
    """What a child is opened with.

    Args:
        site: the hospital's id, for messages.
        folder: the study's bundle, as this hospital approved it.
        bundle: the same, read.
        files: the hospital's records.
        split_key: divides patients into training and held out.
        device: auto, cpu or cuda.
        code: what the child's code must hash to.
    """

    site: str
    folder: Path
    bundle: Bundle
    files: LocalFiles
    split_key: bytes
    device: str
    code: bytes

    @property
    def names(self) -> frozenset[str]:
        """The tensors of a state that training reads; a server optimiser's stay where they are."""
        names = [spec.name for spec in self.bundle.trained.specs]
        return frozenset({*names, *(CORRECTION + name for name in names), MEAN, DEVIATION})

    def fields(self) -> dict[str, Any]:
        """The header that opens a child."""
        return {
            "verb": "open",
            "folder": str(self.folder.absolute()),
            "study": self.bundle.digest,
            "split": self.split_key,
            "device": self.device,
            "code": self.code,
            **self.files.dump(),
        }


def frame_bound(bundle: Bundle) -> int:
    """The most bytes of arrays that either side may send for this study."""
    values = 2 * bundle.trained.size + 2 * bundle.study.feature_count
    words = scoring_of(bundle.study).length + 3 * bundle.study.feature_count
    return 4 * values + 8 * words


# ---------------------------------------------------------------------------- frames


class _Channel:
    """Frames over two descriptors; `wait` is called with one before it is read or written."""

    def __init__(
        self, inward: int, outward: int, wait: Callable[[int, int], None] | None = None
    ) -> None:
        self._in, self._out = inward, outward
        self._wait = wait
        self.bound = 0

    def send(self, header: Header, arrays: Arrays | None = None) -> None:
        """Write one frame. Raises OSError."""
        # Contiguous already, as a rule: then nothing is copied here.
        given = {n: np.ascontiguousarray(a, _order(a)) for n, a in (arrays or {}).items()}
        shapes = {n: tuple(a.shape) for n, a in (arrays or {}).items()}
        told = tuple((n, a.dtype.str, shapes[n]) for n, a in given.items())
        head = encode({**header, "arrays": told})
        size = sum(a.nbytes for a in given.values())
        self._write(_HEAD.pack(_MAGIC, len(head), size) + head)
        for array in given.values():
            self._write(flat_view(array))

    def receive(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
        """The next frame; None where the other side is gone before one began.

        Raises:
            ProtocolError: what came is no frame, or beyond `bound`.
            EOFError: the other side went away within one.
        """
        start = self._read(_HEAD.size)
        if start is None:
            return None
        magic, length, size = _HEAD.unpack(start.tobytes())
        if magic != _MAGIC or length > MAX_HEADER or size > self.bound:
            raise ProtocolError(Code.OVERSIZED, "A frame of the trainer is beyond its bound.")
        header: Any = decode(self._whole(length).tobytes(), max_bytes=MAX_HEADER)
        body = self._whole(size)
        try:
            return dict(header), _views(header["arrays"], body)
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(
                Code.MALFORMED, "A frame of the trainer is not well-formed."
            ) from None

    def _whole(self, count: int) -> NDArray[np.uint8]:
        found = self._read(count)
        if found is None:
            raise EOFError
        return found

    def _read(self, count: int) -> NDArray[np.uint8] | None:
        target = np.empty(count, np.uint8)
        view, at = flat_view(target), 0
        while at < count:
            if self._wait is not None:
                self._wait(self._in, select.POLLIN)
            got = os.readv(self._in, [view[at:]])
            if not got:
                if at:
                    raise EOFError
                return None
            at += got
        return target

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view.nbytes:
            if self._wait is not None:
                self._wait(self._out, select.POLLOUT)
            try:
                view = view[os.write(self._out, view) :]
            except BlockingIOError:
                continue


def _order(array: NDArray[Any]) -> str:
    kind = array.dtype.newbyteorder("<").str
    if kind not in _KINDS:
        raise TypeError(f"arrays of {array.dtype} do not travel to a trainer")
    return kind


def _views(told: Any, body: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """The arrays that lie one after another in `body`, without a copy."""
    found: dict[str, NDArray[Any]] = {}
    at = 0
    for name, kind, shape in told:
        if kind not in _KINDS or name in found or any(width < 0 for width in shape):
            raise ValueError
        dtype = np.dtype(kind)
        count = int(np.prod(shape, dtype=object)) if shape else 1
        end = at + count * dtype.itemsize
        if end > len(body):
            raise ValueError
        found[name] = body[at:end].view(dtype).reshape(shape)
        at = end
    if at != len(body):
        raise ValueError
    return found


# ---------------------------------------------------------------------------- the daemon's side


class TrainerProcess:
    """The Trainer port over a child process that starts on first use and is started again.

    Args:
        task: what the child is opened with.
        log: the file that takes what the child and its libraries print.
        cancelled: looked at several times a second while the child works; once it is true the
            child is ended at once.
        seconds: the longest that one piece of work may take.
        command: the program; for tests.

    Guarantee: whatever becomes of the child, this process goes on. Nothing here imports torch.
    """

    def __init__(
        self,
        task: TrainerTask,
        *,
        log: Path,
        cancelled: Callable[[], bool] = lambda: False,
        seconds: float | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._task = task
        self._log = log
        self._cancelled = cancelled
        self._seconds = task.bundle.study.deadlines.train_s if seconds is None else seconds
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._channel = _Channel(-1, -1)
        self._until = 0.0
        self._guard = threading.Lock()
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """The child's process id, or None where there is none."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def ready(self) -> None:
        """Start the child where there is none, with records read and the model built.

        Raises:
            DataError: the records or the backbone cannot be used, or TRAINER_LOST.
            RefusedError: the kill switch is on, or the code on disk is not what was approved.
        """
        with self._guard:
            self._open()

    def train(self, state: Tensors, round_number: int) -> NDArray[np.float32] | NDArray[np.int32]:
        """One round's update, (d,), or (d + p,) with tensors of the hospital's own.

        Raises as `ready`, and as LocalTrainer.train.
        """
        bundle = self._task.bundle
        update = self._work("train", self._seen(state), round=round_number)
        kind = np.int32 if bundle.study.privacy.mode == "joint" else np.float32
        return _shaped(update, kind, (bundle.trained.size,))

    def measure(self, state: Tensors, round_number: int) -> NDArray[np.int64]:
        """The metric words of `state`, (m,) int64. Raises as `ready`."""
        # The child is given the model alone: which one is released is settled here.
        seen = self._seen(released(state))
        return _shaped(self._work("measure", seen, round=round_number), np.int64)

    def statistics(self) -> NDArray[np.int64]:
        """The statistic words, (s,) int64. Raises as `ready`."""
        return _shaped(self._work("statistics", {}), np.int64)

    def export(self, folder: Path, state: Tensors) -> None:
        """Write the trained model as a folder. Raises as `ready`, and StorageError."""
        with self._guard:
            self._open()
            self._call({"verb": "export", "folder": str(folder.absolute())}, self._seen(state))

    def close(self) -> None:
        """End the child; a later call starts another."""
        with self._guard:
            self._end()

    def _work(self, verb: str, state: Arrays, **fields: int) -> NDArray[Any]:
        with self._guard:
            self._open()
            answer = self._call({"verb": verb, **fields}, state)
        if "result" not in answer:
            raise _lost("gave no result")
        return answer["result"]

    def _seen(self, state: Tensors) -> Arrays:
        names = self._task.names
        return {name: value for name, value in state.items() if name in names}

    # ------------------------------------------------------------ the child's life

    def _open(self) -> None:
        if self.pid is not None:
            return
        self._end()
        self._start()
        self._call(self._task.fields(), {}, seconds=_OPENING_S)

    def _start(self) -> None:
        try:
            with _log_file(self._log) as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(),
                    bufsize=0,
                    # A Ctrl-C in the terminal is the daemon's to handle.
                    start_new_session=True,
                )
        except OSError as error:
            raise _lost(f"could not be started ({error.strerror})") from None
        self.starts += 1
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise AssertionError("the child was started with pipes")
        for stream in (process.stdin, process.stdout):
            os.set_blocking(stream.fileno(), False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._channel = _Channel(process.stdout.fileno(), process.stdin.fileno(), self._wait)
        self._channel.bound = frame_bound(self._task.bundle)

    def _end(self) -> int | None:
        """End the child for certain; its exit status, negative for a signal."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            # Most often it is dead; where it is not, closed pipes are its sign to go.
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _call(self, header: Header, arrays: Arrays, *, seconds: float | None = None) -> Arrays:
        """One question and its answer; the child is gone after every failure but a told one."""
        self._until = time.monotonic() + (self._seconds if seconds is None else seconds)
        try:
            self._channel.send(header, arrays)
            frame = self._channel.receive()
        except (OSError, EOFError, ProtocolError):
            frame = None
        except (RefusedError, DataError):
            self._end()
            raise
        if frame is None:
            raise _lost(_how(self._end()))
        told, answer = frame
        if told.get("verb") == "fault":
            if header["verb"] == "open":
                self._end()
            raise _fault(told, header["verb"])
        return answer

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(_TICK_MS):
            if self._cancelled():
                raise RefusedError(
                    Code.APPROVAL_STOPPED, "The work was ended: this hospital stops."
                )
            if time.monotonic() > self._until:
                raise _lost("gave no answer in time")


def _shaped(
    array: NDArray[Any], kind: type[np.generic], shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    if array.dtype != kind or array.ndim != 1 or shape not in {None, array.shape}:
        raise _lost("gave a result of another shape")
    return array


def _lost(how: str) -> DataError:
    return DataError(Code.TRAINER_LOST, f"The trainer {how}.")


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _fault(told: Header, verb: str) -> WardroundError:
    """What went wrong in the child, as the daemon may catch it."""
    code = _CODES.get(str(told.get("code")), Code.TRAINER_LOST)
    message, remedy = str(told.get("message")), str(told.get("remedy"))
    kinds: Mapping[str, type[WardroundError]] = {"RefusedError": RefusedError}
    if verb == "export":
        kinds = {**kinds, "StorageError": StorageError}
    return kinds.get(str(told.get("kind")), DataError)(code, message, remedy=remedy)


@contextlib.contextmanager
def _log_file(path: Path) -> Any:
    """The child's log, for its owner only; begun anew where it has grown long."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        flags |= os.O_TRUNC
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    """The daemon's environment without what the child must not use: the network."""
    kept = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    # A study names its backbone: no name in it makes a hospital fetch anything.
    kept |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    home = str(Path(str(client.__file__)).resolve().parent.parent)
    if home not in site.getsitepackages():  # a checkout: the child must find the same code
        known = kept.get("PYTHONPATH", "")
        kept["PYTHONPATH"] = home + (os.pathsep + known if known else "")
    return kept


# ---------------------------------------------------------------------------- the child's side


class _Opened:
    """A study open for work in the child."""

    def __init__(self, header: Header, entropy: Entropy) -> None:
        self.bundle = _bundle(header)
        self.trainer = _trainer(header, self.bundle, entropy)


def _bundle(header: Header) -> Bundle:
    code = code_digest(PACKAGES)
    if code != header["code"]:
        raise RefusedError(
            Code.APPROVAL_CODE,
            f"The code on disk, {short(code)}…, is not what this hospital approved.",
        )
    bundle = Bundle.load(Path(header["folder"]))
    if bundle.digest != header["study"]:
        raise DataError(Code.BUNDLE_DAMAGED, "The bundle on disk is another study's.")
    return bundle


def _trainer(header: Header, bundle: Bundle, entropy: Entropy) -> Trainer:
    """Records first: a fault in them is told before torch is loaded."""
    study = bundle.study
    files = LocalFiles.load(header)
    records = files.read(study)
    read_knowledge(study.task, files.knowledge)
    split = HeldOutSplit(header["split"], study.evaluation.held_out)
    train, held_out = divide(records, split)
    from client.devices import choose_device
    from client.federation import build_learner, build_trainer

    _require_backbone(bundle)
    device = choose_device(header["device"])
    learner = build_learner(study, train, held_out, device)
    return build_trainer(bundle, learner, entropy, header["device"])


def _require_backbone(bundle: Bundle) -> None:
    if bundle.study.model is None:
        from client.tasks.kinds import code_of

        found = code_of(bundle.study.task).architecture(bundle.study.task)[0]
    else:
        from client.tasks.backbone import load_backbone

        found = load_backbone(bundle.study.model.backbone).digest
    if found != bundle.backbone_digest:
        raise DataError(
            Code.BACKBONE_DIFFERS,
            f"The backbone here is {short(found)}…, the study's is "
            f"{short(bundle.backbone_digest)}….",
        )


def serve(inward: int, outward: int, *, entropy: Entropy) -> None:
    """Answer frames until the other side is gone.

    Args:
        inward: the descriptor to read from.
        outward: the descriptor to write to.
        entropy: where noise comes from; the operating system in every real run.
    """
    channel = _Channel(inward, outward)
    opened: _Opened | None = None
    while (frame := channel.receive()) is not None:
        header, arrays = frame
        try:
            if header["verb"] == "open":
                opened = _Opened(header, entropy)
                channel.bound = frame_bound(opened.bundle)
                answer: Arrays = {}
            elif opened is None:
                raise ProtocolError(Code.MALFORMED, "The trainer was asked before it was opened.")
            else:
                answer = _answer(opened, header, arrays)
        except WardroundError as error:
            channel.send(
                {
                    "verb": "fault",
                    "kind": type(error).__name__,
                    "code": error.code.label,
                    "message": error.message,
                    "remedy": error.remedy,
                }
            )
            continue
        # What came is not needed any more, and the next frame needs the room.
        del frame, arrays
        channel.send({"verb": "done"}, answer)
        del answer


def _answer(opened: _Opened, header: Header, arrays: dict[str, NDArray[Any]]) -> Arrays:
    match header["verb"]:
        case "train":
            return {"result": opened.trainer.train(arrays, header["round"])}
        case "measure":
            return {"result": opened.trainer.measure(arrays, header["round"])}
        case "statistics":
            return {"result": opened.trainer.statistics()}
        case "export":
            from client.federation import export_final

            export_final(Path(header["folder"]), opened.bundle.study, arrays)
            return {}
    raise ProtocolError(Code.MALFORMED, "The trainer was asked for what it does not do.")


def _place_only(
    kind: type[BaseException], _value: BaseException, trace: TracebackType | None
) -> None:
    """A bug's type and places, without its text: that may repeat what a record says."""
    sys.stderr.write(f"{kind.__module__}.{kind.__qualname__}\n")
    while trace is not None:
        code = trace.tb_frame.f_code
        sys.stderr.write(f"  {code.co_filename}:{trace.tb_lineno} {code.co_name}\n")
        trace = trace.tb_next


def _end_with_parent(inward: int) -> None:
    """End this process, in the middle of whatever it does, once the parent's end is closed."""

    def watch() -> NoReturn:
        poll = select.poll()
        poll.register(inward, 0)  # hang-up is always told
        poll.poll()
        os._exit(3)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main() -> int:
    """The child: standard input and output are the channel, and nobody else's."""
    inward, outward = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    sys.excepthook = _place_only
    # Memory holds records and noise: none of it goes into a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out, the kernel shall take this process and not the daemon.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    _end_with_parent(inward)
    serve(inward, outward, entropy=SystemEntropy())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
