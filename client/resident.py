"""One hospital's resident process, for stock SuperNodes: they run every message in a new process.

A round's secrets live in memory and nowhere else: neither on a disk nor in Flower's context. So
the process that Flower starts for a message relays the signed question to a process of the
hospital that stays. That one holds `HospitalHost`: keys, journal, ledger and trainer. It is
started by the first question and ends after long silence or by a signal. The two speak over a
socket file in the state folder that only the hospital's own user can open.

    question   head, {"hello", "sizes", envelope}, payloads
    answer     head, {"sizes", envelope}, payloads   or   head, {"fault": label}

The resident checks the coordinator's signature itself, so whoever may speak to it can do no more
than the coordinator. Nothing here imports Flower or torch.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import site
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

import client
from client.answer import Hospital, answered, report
from client.config import SiteConfig
from client.folders import HospitalFolder
from common.config import load
from common.crypto.digest import decode, encode
from common.errors import Code, ConfigError, ProtocolError, StorageError, WardroundError
from common.protocol.envelope import MAX_PAYLOADS, Envelope
from common.world import make_folder, unix_seconds, write_durably

__all__ = ["Relay", "Resident", "main", "relay_for"]

SITE_SETTING: Final = "wardround-site"
IDLE_SETTING: Final = "wardround-idle-s"
# Longer than any pause within a run should be: who leaves in the middle of one has to begin its
# round anew.
IDLE_S: Final = 24 * 3600.0
COMMAND: Final = (sys.executable, "-P", "-m", "client.resident")
MOST_BYTES: Final = 1 << 34
_MOST_HEADER: Final = 1 << 14
_HEAD: Final = struct.Struct(">4sI")
_MAGIC: Final = b"WRR1"
_READY: Final = "ready"
_START_S: Final = 120.0
_TICK_S: Final = 1.0
_PEER_S: Final = 60.0
_QUEUE: Final = 16
# What the kernel takes for the name of a socket.
_MOST_PATH: Final = 100
_LOG_BYTES: Final = 1 << 20
_CODES: Final = {code.label: code for code in Code}
_ENVELOPE: Final[Mapping[str, type]] = {
    "study": bytes,
    "sender": str,
    "recipient": str,
    "nonce": bytes,
    "code": str,
    "signature": bytes,
}

Signed = tuple[Envelope, tuple[bytes, ...]]


# ---------------------------------------------------------------------------- places


def _socket(folder: HospitalFolder) -> Path:
    return folder.root / "resident.sock"


def _start_lock(folder: HospitalFolder) -> int:
    """A descriptor of the lock that starting and ending hold. Raises StorageError."""
    path = folder.root / "resident.lock"
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{path}: cannot be written ({error.strerror})."
        ) from None


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """The name of a socket file for the kernel, however deep its folder lies."""
    if len(os.fsencode(path)) <= _MOST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


# ---------------------------------------------------------------------------- frames


def _send(
    connection: socket.socket,
    fields: Mapping[str, bytes | str | int | tuple[int, ...]],
    payloads: Sequence[bytes] = (),
) -> None:
    sizes = tuple(len(payload) for payload in payloads)
    head = encode({**fields, "sizes": sizes})
    connection.sendall(_HEAD.pack(_MAGIC, len(head)) + head)
    for payload in payloads:
        connection.sendall(payload)


def _receive(stream: BinaryIO) -> tuple[dict[str, object], tuple[bytes, ...]]:
    """One frame. Raises ProtocolError; EOFError where the other side is gone."""
    magic, length = _HEAD.unpack(_whole(stream, _HEAD.size))
    if magic != _MAGIC or length > _MOST_HEADER:
        raise _malformed()
    told = decode(_whole(stream, length), max_bytes=_MOST_HEADER)
    if not isinstance(told, Mapping):
        raise _malformed()
    fields: dict[str, object] = dict(told)
    sizes = fields.pop("sizes", None)
    if not isinstance(sizes, tuple) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise _malformed()
    if len(sizes) > MAX_PAYLOADS or sum(sizes) > MOST_BYTES:
        raise ProtocolError(Code.OVERSIZED, "A frame of the resident is beyond its bound.")
    return fields, tuple(_whole(stream, size) for size in sizes)


def _whole(stream: BinaryIO, count: int) -> bytes:
    found = stream.read(count)
    if len(found) != count:
        raise EOFError
    return found


def _envelope(fields: Mapping[str, object]) -> Envelope:
    if {name: type(value) for name, value in fields.items()} != _ENVELOPE:
        raise _malformed()
    return Envelope(**fields)  # type: ignore[arg-type] # the types were just looked at


def _fields(envelope: Envelope) -> dict[str, bytes | str | int | tuple[int, ...]]:
    return {name: getattr(envelope, name) for name in _ENVELOPE}


def _malformed() -> ProtocolError:
    return ProtocolError(Code.MALFORMED, "A frame of the resident is not well-formed.")


# ---------------------------------------------------------------------------- Flower's side


def relay_for(node_config: Mapping[str, object]) -> Relay:
    """The relay that a SuperNode's own configuration names. Raises ConfigError."""
    named = node_config.get(SITE_SETTING)
    path = Path(named) if isinstance(named, str) else Path()
    if not path.is_absolute() or not path.is_file():
        raise ConfigError(Code.RESIDENT_SETTING, f"{SITE_SETTING} names no file.")
    idle = node_config.get(IDLE_SETTING, IDLE_S)
    if isinstance(idle, bool) or not isinstance(idle, int | float) or not idle > 0:
        raise ConfigError(Code.RESIDENT_SETTING, f"{IDLE_SETTING} is no time.")
    return Relay(path, idle_s=float(idle))


class Relay:
    """Asks the hospital's resident process, and starts it where there is none.

    Args:
        path: the hospital's site.yaml.
        idle_s: how long a resident that this one starts stays without a question.
        command: the program; for tests.

    Guarantee: at most one process holds the hospital's folder, however many relays start one.
    """

    def __init__(
        self, path: Path, *, idle_s: float = IDLE_S, command: Sequence[str] = COMMAND
    ) -> None:
        self._path = path
        self._folder = HospitalFolder(load(path, SiteConfig).state_folder(path))
        self._idle_s = idle_s
        self._command = tuple(command)

    def answered(self, question: Envelope, payloads: Sequence[bytes], *, hello: bool) -> Signed:
        """The resident's signed answer.

        Raises:
            ProtocolError: the question is not the coordinator's.
            StorageError: FOLDER_IN_USE where the hospital's daemon runs; RESIDENT_LOST.
        """
        with self._connected() as connection, connection.makefile("rb") as stream:
            try:
                _send(connection, {"hello": int(hello), **_fields(question)}, payloads)
                fields, answers = _receive(stream)
            except (OSError, EOFError):
                raise _lost("ended before it answered") from None
        if "fault" in fields:
            raise _told(str(fields["fault"]))
        return _envelope(fields), answers

    def _connected(self) -> socket.socket:
        found = self._reached()
        if found is not None:
            return found
        lock = _start_lock(self._folder)
        try:
            # Held by who starts and by who ends: nobody else does either meanwhile.
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self._reached()
            if found is None:
                self._start()
                found = self._reached()
        finally:
            os.close(lock)
        if found is None:
            raise _lost("cannot be reached")
        return found

    def _reached(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _address(_socket(self._folder)) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            return None
        except OSError as error:
            connection.close()
            raise _lost(f"cannot be reached ({error.strerror})") from None
        return connection

    def _start(self) -> None:
        """Start the resident and wait until it answers. Raises StorageError."""
        command = (*self._command, str(self._path), "--idle", str(self._idle_s))
        try:
            with _log_file(self._folder.root / "resident.log") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_environment(),
                    # It outlives the process that Flower started for this message.
                    start_new_session=True,
                )
        except OSError as error:
            raise _lost(f"could not be started ({error.strerror})") from None
        if process.stdout is None:
            raise AssertionError("the resident was started with a pipe")
        with process.stdout as pipe:
            heard = bool(select.select([pipe], [], [], _START_S)[0])
            told = pipe.readline(_MOST_HEADER).decode("ascii", "replace").strip() if heard else ""
        if told == _READY:
            # It is nobody's to wait for: this process ends long before it.
            process.returncode = 0
            return
        process.kill()
        process.wait()
        raise _told(told) if told else _lost("did not start")


def _told(label: str) -> WardroundError:
    code = _CODES.get(label)
    if code is None:
        return _lost("said something unreadable")
    if code in {Code.MALFORMED, Code.OVERSIZED, Code.MESSAGE_SIGNATURE}:
        return ProtocolError(code, "The resident does not take the question.")
    return StorageError(code, "The hospital's resident process cannot work.")


def _lost(how: str) -> StorageError:
    return StorageError(Code.RESIDENT_LOST, f"The resident process {how}.")


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[int]:
    """What the resident prints, for its owner only; begun anew where it has grown long."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        flags |= os.O_TRUNC
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _environment() -> dict[str, str]:
    """This process's environment without Flower's settings and without the network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FLWR_") and not name.lower().endswith("_proxy")
    }
    home = str(Path(str(client.__file__)).resolve().parent.parent)
    if home not in site.getsitepackages():  # a checkout: the process must find the same code
        known = kept.get("PYTHONPATH", "")
        kept["PYTHONPATH"] = home + (os.pathsep + known if known else "")
    return kept


# ---------------------------------------------------------------------------- the resident's side


class Resident:
    """Answers questions over the socket, one at a time.

    Args:
        hospital: whom it answers for; it holds the state folder.
        folder: where the socket lies.
        idle_s: it ends after this long without a question.
        heard: called after every question that the coordinator had signed.
    """

    def __init__(
        self,
        hospital: Hospital,
        folder: HospitalFolder,
        *,
        idle_s: float = IDLE_S,
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        self._hospital = hospital
        self._folder = folder
        self._idle_s = idle_s
        self._heard = heard
        self._ending = False
        self._listener = _listening(_socket(folder))

    def stop(self) -> None:
        """Begin to end; may be called by a signal's handler."""
        self._ending = True

    def run(self) -> None:
        """Until `stop`, or long silence."""
        try:
            until = time.monotonic() + self._idle_s
            while not self._ending:
                if self._one(min(_TICK_S, max(0.0, until - time.monotonic()))):
                    until = time.monotonic() + self._idle_s
                elif time.monotonic() >= until and self._left():
                    return
        finally:
            self._unlink()
            self._listener.close()

    def _left(self) -> bool:
        """End after silence, unless somebody is just coming."""
        lock = _start_lock(self._folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        # Kept until this process is gone: who finds no socket waits for that, and starts another.
        self._unlink()
        while self._one(0.0):
            pass
        return True

    def _unlink(self) -> None:
        _socket(self._folder).unlink(missing_ok=True)

    def _one(self, seconds: float) -> bool:
        """Serve the next question, if one comes in time."""
        if not select.select([self._listener], [], [], seconds)[0]:
            return False
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError, EOFError):
            # Who was asked and is gone loses its answer; the coordinator asks anew.
            connection.settimeout(_PEER_S)
            self._serve(connection)
        return True

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("rb") as stream:
                fields, payloads = _receive(stream)
            hello = bool(fields.pop("hello", 0))
            answer = answered(self._hospital, _envelope(fields), payloads, hello=hello)
        except WardroundError as error:
            _send(connection, {"fault": error.code.label})
            return
        except (OSError, EOFError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, only a code may leave
            report(error)
            _send(connection, {"fault": Code.INTERNAL_FAULT.label})
            return
        self._heard()
        _send(connection, _fields(answer[0]), answer[1])


def _listening(path: Path) -> socket.socket:
    """The socket, open to this user alone. The folder's lock is held: nobody else listens."""
    make_folder(path.parent, mode=0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _address(path) as address:
            listener.bind(address)
    except OSError as error:
        listener.close()
        raise StorageError(
            Code.JOURNAL_WRITE, f"{path}: cannot be made ({error.strerror})."
        ) from None
    finally:
        os.umask(before)
    listener.listen(_QUEUE)
    return listener


def reside(path: Path, *, idle_s: float, ready: Callable[[], None]) -> None:
    """Be the resident of the hospital whose `site.yaml` is at `path`.

    Raises:
        ConfigError: site.yaml, or NOT_ENROLLED.
        RefusedError: the installed code was altered.
        StorageError: FOLDER_IN_USE, or a file that cannot be used.
    """
    from client.enrol import pinned
    from client.hospital import HospitalHost
    from client.trainer import PACKAGES
    from common.integrity import verify
    from common.logs import open_log

    config = load(path, SiteConfig)
    folder = HospitalFolder(config.state_folder(path))
    pin = pinned(folder.root)
    if pin.site != config.site:
        raise ConfigError(Code.SITE_MISMATCH, f"{pin.site} is at home here, not {config.site}.")
    verify(PACKAGES)
    log = open_log(folder.log)
    host = HospitalHost(config, path, coordinator=pin.coordinator, log=log)

    def heard() -> None:
        now = unix_seconds()
        told = {"at": now, "running": True, "stopped": host.stopped(), "link": None}
        # A full disk must not end a hospital that has nothing else to write.
        with contextlib.suppress(StorageError):
            beat = json.dumps({"at": now, "pid": os.getpid()}).encode()
            write_durably(folder.heartbeat, [beat], durable=False)
            status = json.dumps({**told, **host.facts()}).encode()
            write_durably(folder.status, [status], durable=False)

    try:
        resident = Resident(host, folder, idle_s=idle_s, heard=heard)

        def end(_number: int, _frame: object) -> None:
            resident.stop()
            host.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        log.info("resident.started", site=host.site)
        ready()
        resident.run()
        log.info("resident.stopped", site=host.site)
    finally:
        host.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The resident process; its standard output says, in one line, whether it is ready."""
    parser = argparse.ArgumentParser(prog="client.resident")
    parser.add_argument("site", type=Path)
    parser.add_argument("--idle", type=float, default=IDLE_S)
    told = parser.parse_args(arguments)
    # What this process writes is the hospital's own; its memory holds keys and updates.
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def say(line: str) -> None:
        os.write(1, f"{line}\n".encode())
        # The process that asked goes away, and takes its end of the pipe along.
        os.dup2(2, 1)

    try:
        reside(told.site, idle_s=told.idle, ready=lambda: say(_READY))
    except WardroundError as error:
        say(error.code.label)
        return error.exit_status
    except Exception as error:  # noqa: BLE001 - its text may quote a record, and a log is no place
        report(error)
        say(Code.INTERNAL_FAULT.label)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
