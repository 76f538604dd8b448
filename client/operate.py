"""The hospital's daemon: one host, one line to the coordinator, and what it says of itself.

It listens on nothing. Its heartbeat is a file, written when the coordinator was last heard; its
status is a file, too, so that `wardround client status` needs no way into the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from client.config import SiteConfig
from client.enrol import Pinned, pinned, transport_keys
from client.folders import HospitalFolder
from client.hospital import HospitalHost
from client.link import LinkLimits, LinkState, LinkWorld
from client.trainer import PACKAGES
from common.config import load
from common.errors import Code, ConfigError, StorageError
from common.integrity import verify
from common.logs import open_log
from common.world import unix_seconds, write_durably

if TYPE_CHECKING:
    from common.logs import Log

__all__ = ["Operation", "operate"]

_TICK_S: Final = 2.0
# How long an unknown key is tried before an older one: the coordinator may be about to admit it.
_TURN_TICKS: Final = 8


class Line(Protocol):
    """What is asked of the link (`client.flower.FleetLink`)."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set."""
        ...

    def state(self) -> LinkState:
        """The line as it stands."""
        ...


LineMaker = Callable[[Path, Callable[[], None]], Line]


class Operation:
    """The daemon's main thread: keeps the line up and the status fresh until it is told to stop.

    Args:
        host: the hospital.
        keys: the connection's keys, newest first: after a rotation the coordinator knows the
            older one until it admits the newer.
        line: makes the line under a key, with what it calls at every sign of life.
        log: the operator's log.
    """

    def __init__(
        self, host: HospitalHost, keys: tuple[Path, ...], line: LineMaker, log: Log
    ) -> None:
        self._host, self._keys, self._make, self._log = host, keys, line, log
        self._stop = threading.Event()
        self._line: Line | None = None
        self._unknown = 0

    def stop(self) -> None:
        """Begin to end; from any thread, or a signal's handler."""
        self._stop.set()
        self._host.stop()

    def run(self) -> None:
        """Until `stop`. Raises what is our own fault, never the network's."""
        self._log.info("daemon.started", site=self._host.site)
        turn = 0
        while not self._stop.is_set():
            ended = threading.Event()
            self._line = self._make(self._keys[turn % len(self._keys)], self.beat)
            watch = threading.Thread(target=self._watch, args=(ended,), daemon=True)
            watch.start()
            try:
                self._line.run(ended)
            finally:
                ended.set()
                watch.join()
            turn += 1
        self._write_status(running=False)
        self._log.info("daemon.stopped", site=self._host.site)

    def _watch(self, ended: threading.Event) -> None:
        """Every two seconds: the status, and whether this line has come to its end."""
        while not ended.is_set():
            self._tick(ended)
            if self._stop.wait(_TICK_S):
                ended.set()

    def _tick(self, ended: threading.Event) -> None:
        line = self._line
        if line is None:
            return
        state = line.state()
        self._write_status(running=True)
        self._unknown = self._unknown + 1 if state.code is Code.NOT_ADMITTED else 0
        if len(self._keys) > 1 and self._unknown >= _TURN_TICKS:
            self._unknown = 0
            ended.set()

    def beat(self) -> None:
        """The coordinator was heard. Raises StorageError."""
        _write(self._host.folder.heartbeat, {"at": unix_seconds(), "pid": os.getpid()})

    def facts(self, *, running: bool) -> dict[str, Any]:
        """What `client status` shows of the daemon."""
        link: dict[str, Any] | None = None
        if self._line is not None:
            state = self._line.state()
            link = asdict(state) | {"code": None if state.code is None else state.code.label}
        return {
            "at": unix_seconds(),
            "running": running,
            "stopped": self._host.stopped(),
            "link": link,
            **self._host.facts(),
        }

    def _write_status(self, *, running: bool) -> None:
        # A full disk must not end a hospital that has nothing else to write.
        with suppress(StorageError):
            _write(self._host.folder.status, self.facts(running=running))


def _write(path: Path, told: Mapping[str, Any]) -> None:
    write_durably(path, [json.dumps(told).encode()], durable=False)


def operate(path: Path) -> None:
    """Run the hospital of the `site.yaml` at `path` until a signal ends it.

    Raises:
        ConfigError: site.yaml, or NOT_ENROLLED.
        RefusedError: the installed code was altered.
        StorageError: FOLDER_IN_USE, or a file that cannot be used.
    """
    config = load(path, SiteConfig)
    folder = HospitalFolder(config.state_folder(path))
    pin = _own_pin(config, folder)
    verify(PACKAGES)
    # What this process writes is the hospital's own; its memory holds keys and updates.
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    keys = transport_keys(folder.root)
    log = open_log(folder.log)
    host = HospitalHost(config, path, coordinator=pin.coordinator, log=log)
    try:
        operation = Operation(host, keys, _line_maker(host, config, pin, log), log)
        with _ended_by_signals(operation.stop):
            operation.run()
    finally:
        host.close()


def _own_pin(config: SiteConfig, folder: HospitalFolder) -> Pinned:
    pin = pinned(folder.root)
    if pin.site != config.site:
        raise ConfigError(
            Code.SITE_MISMATCH,
            f"{folder.root}: {pin.site} is at home here, and site.yaml names {config.site}.",
        )
    return pin


def _line_maker(host: HospitalHost, config: SiteConfig, pin: Pinned, log: Log) -> LineMaker:
    """Flower comes in here and nowhere before."""
    from client.app import app, bind
    from client.flower import FleetLink

    bind(host)
    limits = LinkLimits(config.link.bits_per_second, config.link.hours)
    world = LinkWorld(proxy=config.link.proxy, log=log)

    def make(key: Path, beat: Callable[[], None]) -> Line:
        return FleetLink(
            pin.url,
            pin.ca,
            key,
            app,
            {},
            state=host.folder.root,
            limits=limits,
            beat=beat,
            may_leave=host.may_leave,
            world=world,
        )

    return make


@contextmanager
def _ended_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemon cleanly."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda _number, _frame: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
