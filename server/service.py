"""The coordinator's process: listeners, one run, and what an operator looks at meanwhile."""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from common.config import load
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError, WardroundError
from common.logs import Log, open_log
from common.world import SystemClock, make_folder, unix_seconds
from server.app import Exchange, Pace, Presence, app, bind
from server.config import CoordinatorConfig
from server.deploy import CoordinatorRun, Heard, RunFolder, Tapped, prepare
from server.enrol import Admitted, admin_token, admitted, coordinator_key
from server.flower import FlowerCoordinator, Route, TlsFiles, Wire
from server.pki import ensure_certificate
from server.report import Conclusion
from server.watch import FRESH_SECONDS, Health, RunStatus, keep, registry

__all__ = ["Farewell", "Service", "open_service"]

_MIB: Final = 1 << 20
_LOOK_SECONDS: Final = 1.0
_SITES_SECONDS: Final = 2.0
_CERTIFICATE_SECONDS: Final = 24 * 3600.0
_GRACE_SECONDS: Final = 5.0
_DESCRIPTORS: Final = 4096


@contextmanager
def open_service(path: Path) -> Iterator[Service]:
    """The coordinator of `coordinator.yaml`; SIGTERM and SIGINT end it in order.

    Raises ConfigError, StorageError.
    """
    config = load(path, CoordinatorConfig)
    state = config.state_folder(path)
    make_folder(state, mode=0o700)
    log = open_log(state / "log.jsonl", level=config.log_level)
    _prepare_process()
    stop = threading.Event()

    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, ask_to_stop) for number in _SIGNALS}
    try:
        yield Service(config, path, state, coordinator_key(state), log, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def _prepare_process() -> None:
    """Room for every caller that the listener lets in; and no memory with keys in a core file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(_DESCRIPTORS, most)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass
class Service:
    """One coordinator process."""

    config: CoordinatorConfig
    path: Path
    state: Path
    key: SiteKey
    log: Log
    stop: threading.Event

    def prepare(self, bundle: Path) -> RunFolder:
        """The folder of this study's run, new or as it was left. Raises ConfigError."""
        return prepare(self.state, bundle, self.key.public)

    def run(self, folder: RunFolder, *, linger: float) -> Conclusion | None:
        """Serve the run to its end, and `linger` seconds more for hospitals that come late.

        Returns what it came to, or None where it was stopped before. Raises StorageError,
        ConfigError.
        """
        run = CoordinatorRun(folder, self.key, log=self.log)
        try:
            with _Station(self, run, linger) as station:
                station.serve()
            if run.final is None:
                self.log.info("run.stopped", round=run.machine.record.round)
                return None
            return _concluded(run)
        finally:
            run.close()


def _concluded(run: CoordinatorRun) -> Conclusion:
    """A run is concluded once; later it says the same again."""
    if run.folder.conclusion.exists():
        run.seal()
        return Conclusion.from_json(json.loads(run.folder.conclusion.read_text()))
    return run.conclude()


class _Station:
    """A run on its listeners, with the thread that looks after it."""

    def __init__(self, service: Service, run: CoordinatorRun, linger: float) -> None:
        self._service, self._run = service, run
        self._farewell = Farewell(linger)
        self._clock = SystemClock()
        self._turned = self._clock.now()
        self._most = run.terms.upload_bytes() + _MIB
        self._status: RunStatus | None = None
        self._done = threading.Event()
        config, state = service.config, service.state
        certificate = ensure_certificate(state, config, unix_seconds())
        self._flower = FlowerCoordinator(
            state / "flower",
            listen=(config.listen.host, config.listen.port),
            admin=(config.admin.host, config.admin.port),
            tls=TlsFiles(certificate.cert, certificate.key),
            admin_token=admin_token(state),
            wire=_wire(self._most, len(run.terms.parties)),
            routes=(
                Route("/status", "application/json", self._status_json),
                Route("/metrics", "text/plain; version=0.0.4; charset=utf-8", self._metrics),
            ),
        )
        self._registry = registry(lambda: self._status)
        self._certificate = certificate.cert
        self._issued = certificate.cert.stat().st_mtime_ns
        self._known: dict[str, bytes] = {}
        self._revoked: tuple[str, ...] = ()
        self._exchange: Exchange | None = None
        self._health: Health | None = None
        self._thread = threading.Thread(target=self._look_after, name="watch", daemon=True)

    def __enter__(self) -> Self:
        try:
            # Before anybody is served: who was revoked meanwhile finds nobody at home.
            self._admit()
            self._flower.start()
            self._health = Health(self._service.config.admin.health)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_raised: object) -> None:
        self._close()

    def _close(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_GRACE_SECONDS)
        if self._health is not None:
            self._health.stop()
        self._flower.stop()

    def serve(self) -> None:
        """The run's loop, through the ServerApp. Raises what the driver raises."""
        bind(self._bound)
        self._flower.run(app)

    def _bound(self, _grid: Any) -> None:
        run = self._run
        exchange = Exchange(
            self._flower.grid(most_answer=self._most),
            run.key,
            run.bundle.digest,
            run.keys,
            self._clock,
            registered=self._flower.site_of,
            silence=self._flower.silence,
            watch=_Watch(self._service.log),
            pace=Pace(poll_s=0.5, look_s=0.2, linger_s=0.0, most_answer=self._most),
            pause=self._flower.wait,
        )
        self._exchange = exchange
        for site in self._revoked:
            exchange.forget(site)
        self._thread.start()
        exchange.serve(Tapped(run.driver(exchange), run.tap.see), self._over)
        # The other thread writes the same file.
        self._done.set()
        self._thread.join(_GRACE_SECONDS)
        with suppress(StorageError):
            self._look()

    def _over(self) -> bool:
        """Whether to end: asked to stop, or everybody has the model, or nobody came for it."""
        now = self._turned = self._clock.now()
        if self._service.stop.is_set():
            return True
        if self._run.final is None:
            return False
        heard = {} if self._exchange is None else self._exchange.presence()
        # A convicted hospital is told nothing when it comes late.
        excused = {*self._revoked, *self._run.machine.record.convicted}
        wanted = set(self._run.terms.parties) - excused
        return self._farewell.over(now, self._run.ended, wanted, heard)

    # ------------------------------------------------------------ the watching thread

    def _look_after(self) -> None:
        sites = certificate = self._clock.now()
        while not self._done.wait(_LOOK_SECONDS):
            now = self._clock.now()
            self._tried(self._look)
            if now - sites >= _SITES_SECONDS:
                sites = now
                self._tried(self._admit)
                self._tried(self._reload)
            if now - certificate >= _CERTIFICATE_SECONDS:
                certificate = now
                self._tried(self._renew)

    def _tried(self, duty: Callable[[], None]) -> None:
        """Do one duty; what goes wrong costs this time, neither the run nor any other duty.

        Whoever was revoked must be out, whatever becomes of the status file.
        """
        try:
            duty()
        except WardroundError as error:
            self._service.log.warning("watch.failed", code=error.code)
        except (OSError, RuntimeError):  # a disk; a look into what the run just changes
            self._service.log.warning("watch.failed", code=Code.INTERNAL_FAULT)

    def _look(self) -> None:
        heard = {} if self._exchange is None else self._exchange.presence()
        now = self._clock.now()
        told = {v: _heard(p, now, self._flower.silence(v)) for v, p in heard.items()}
        self._status = self._run.status(told, self._revoked)
        if self._health is not None:
            self._health.fresh(serving=self._clock.now() - self._turned < FRESH_SECONDS)
        keep(self._service.state, self._status)

    def _admit(self) -> None:
        """Register whoever was admitted, and throw out whoever was revoked, since the last look."""
        found = admitted(self._service.state)
        keys = self._run.keys
        gone = tuple(s.site for s in found if s.revoked or keys.get(s.site) in s.struck)
        for name in gone:
            if name not in self._revoked:
                self._flower.unregister(name)
                self._known.pop(name, None)
                self._service.log.info("site.revoked", site=name)
                if self._exchange is not None:
                    self._exchange.forget(name)
        self._revoked = gone
        for site in found:
            if site.site not in gone and self._known.get(site.site) != site.transport:
                self._let_in(site)

    def _let_in(self, site: Admitted) -> None:
        """Register a site's key; one that cannot be used keeps out that site and nobody else."""
        try:
            self._flower.register(site.site, site.transport)
        except ConfigError as error:
            self._service.log.warning("site.refused", site=site.site, code=error.code)
        self._known[site.site] = site.transport

    def _renew(self) -> None:
        ensure_certificate(self._service.state, self._service.config, unix_seconds())
        self._reload()

    def _reload(self) -> None:
        """Serve a certificate that was renewed, here or by `wardround server renew`."""
        issued = self._certificate.stat().st_mtime_ns
        if issued != self._issued:
            self._issued = issued
            self._flower.renew()

    def _status_json(self) -> bytes:
        status = self._status
        return json.dumps({} if status is None else status.to_json()).encode()

    def _metrics(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self._registry)


def _wire(most: int, parties: int) -> Wire:
    """Bounds by the study: no hospital fills the disk, whatever it sends and however often.

    An answer and a question of every hospital have room; parts of uploads that were given up
    make way for them.
    """
    return Wire(most_answer=most, most_disk=2 * (parties + 2) * most)


@dataclass
class Farewell:
    """Who has answered to the end of the run, and how long the others are waited for.

    Attributes:
        linger: seconds, from the end on.
        told: who has answered; whatever they do afterwards, nobody waits for them again.
    """

    linger: float
    told: set[str] = field(default_factory=set)

    def over(
        self, now: float, ended: float, wanted: Iterable[str], heard: Mapping[str, Presence]
    ) -> bool:
        """Whether all who are `wanted` have answered to the end at `ended`, or time is up."""
        self.told |= {site for site, presence in heard.items() if _told(presence, ended)}
        return now - ended >= self.linger or self.told.issuperset(wanted)


def _told(presence: Presence, ended: float) -> bool:
    """Whether a question from after the end was answered: one that was lost told nobody."""
    sent, answered = presence.last_sent, presence.last_heard
    if sent is None or answered is None or presence.asked or presence.code:
        return False
    return ended <= sent <= answered


def _heard(presence: Presence, now: float, silent: float | None) -> Heard:
    """What the status shows; `silent` counts heartbeats, too, and a long training has many."""
    return Heard(
        presence.online,
        presence.last_heard if silent is None else now - silent,
        presence.asked,
        presence.bytes_up,
        presence.bytes_down,
        presence.code,
    )


@dataclass
class _Watch:
    """What passes, into the operator's log."""

    log: Log

    def arrived(self, site: str) -> None:
        """A hospital is here."""
        self.log.info("site.online", site=site)

    def left(self, site: str) -> None:
        """A hospital's node is gone."""
        self.log.info("site.offline", site=site)

    def answered(self, site: str, size: int, seconds: float, code: str) -> None:
        """An answer was taken."""
        if code:
            self.log.info("site.told", site=site, code=code)
        else:
            self.log.debug("site.answered", site=site, bytes_up=size, seconds=round(seconds, 3))

    def refused(self, site: str, code: Code) -> None:
        """An answer was refused."""
        self.log.warning("peer.refused", site=site or None, code=code)

    def lost(self, site: str, code: str) -> None:
        """A question will not be answered."""
        self.log.warning("question.lost", site=site or None, code=code)
