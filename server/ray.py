"""A simulation whose hospitals live on Ray, and whose messages pass through Flower's own engine.

Flower runs a ClientApp in whichever of its Ray actors is free, and a round's secrets, the model
and the GPU must stay where they are. So every hospital is one long-lived Ray actor of ours, the
resident, and the ClientApp carries the signed question to it and its signed answer back. On one
machine or on a cluster; there every machine needs Wardround, and the study's data and the output
folder under the same path.
"""

from __future__ import annotations

import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# An actor without a share of a GPU sees what the machine has: nothing is hidden by Ray.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import ray

from client.answer import Answer, answered
from client.app import shell_by_context
from client.site import Site, open_federation, open_site, site_key
from common.bundle import Bundle
from common.crypto.identity import SiteKey
from common.errors import (
    AbortedRound,
    Code,
    ConfigError,
    DataError,
    RefusedError,
    StorageError,
    WardroundError,
)
from common.ports import Tensors, Transport
from common.protocol.envelope import COORDINATOR, Envelope
from common.world import SystemEntropy, write_durably
from server.app import Exchange, Pace, app, bind
from server.deploy import Tapped, Unwatched
from server.folder import Paths, origin, study_of
from server.simulate import Hosted, SimulatedRun, founded_ledger

if TYPE_CHECKING:
    from flwr.app import Context

    from client.site import Federation
    from server.table import RunView

__all__ = ["RayRun", "on_ray"]

_PARTITION: Final = "partition-id"
_LOOK_S: Final = 1.0
_POLL_S: Final = 0.05
_LINGER_S: Final = 30.0
# Phases in which every hospital is needed: planned accidents come after them.
_SAFE: Final = frozenset({"handshake", "ready", "idle", "new", "done"})
_KINDS: Final[Mapping[str, type[WardroundError]]] = {
    kind.__name__: kind for kind in (ConfigError, DataError, RefusedError, StorageError)
}

Told = tuple[str, str, str, str]
"""An error as it travels: class, code, message, remedy. Ray would pickle the exception itself."""


def _told(error: WardroundError) -> Told:
    return type(error).__name__, error.code.name, error.message, error.remedy


def _meant(told: Told) -> WardroundError:
    kind, name, message, remedy = told
    return _KINDS.get(kind, StorageError)(Code[name], message, remedy=remedy)


# ---------------------------------------------------------------------------- one hospital


class Resident:
    """One hospital, in a Ray actor of its own (`client.answer.Hospital`).

    Args:
        out: the run's folder; study, bundle and this hospital's state lie there.
        site: its id.
        device: auto, cpu or cuda.
        coordinator: the coordinator's public key.
        roster: everybody's public keys.
        keys_digest: what its audit log says of them.
    """

    def __init__(
        self,
        *,
        out: Path,
        site: str,
        device: str,
        coordinator: bytes,
        roster: Mapping[str, bytes],
        keys_digest: str,
    ) -> None:
        self.site, self.coordinator = site, coordinator
        self._paths, self._device = Paths(out), device
        self._roster, self._keys_digest = roster, keys_digest
        self._entropy = SystemEntropy()
        self.key = site_key(self._paths.site(site), self._entropy)
        self._sent: list[bytes] = []
        self._site: Site | None = None
        self._ledger: Any = None

    def open(self) -> Told | None:
        """Read the records and the journal; what went wrong, if anything."""
        try:
            self._open()
        except WardroundError as error:
            return _told(error)
        return None

    def _open(self) -> None:
        paths = self._paths
        bundle = Bundle.load(paths.bundle)
        config = origin(paths)[0]
        federation = open_federation(study_of(paths.root), config, device=self._device)
        self._ledger = founded_ledger(federation, bundle, paths, self.site)
        setup = Hosted(federation, bundle, paths, self.site).setup(
            self._ledger,
            roster=self._roster,
            keys_digest=self._keys_digest,
            entropy=self._entropy,
            journals=None,
        )
        self._site = open_site(setup, self._ledger, self)

    def send(self, recipient: str, payload: bytes) -> None:
        """The site's transport: what it sends while it is asked is its answer."""
        if recipient != COORDINATOR:
            raise AssertionError("a site speaks to the coordinator alone")
        self._sent.append(payload)

    def key_for(self, study: bytes) -> SiteKey:
        """The key that signs answers."""
        del study
        return self.key

    def ask(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        """Handle the payloads in order."""
        if self._site is None or self._site.setup.bundle.digest != study:
            return Answer((), Code.APPROVAL_STUDY)
        if hello:
            self._site.daemon.start()
        for payload in payloads:
            self._site.daemon.receive(payload)
        sent, self._sent = tuple(self._sent), []
        return Answer(sent)

    def answered(
        self, question: Envelope, payloads: Sequence[bytes], *, hello: bool
    ) -> tuple[Envelope, tuple[bytes, ...]] | Told:
        """The signed answer to a question, or why there is none."""
        try:
            return answered(self, question, payloads, hello=hello)
        except WardroundError as error:
            return _told(error)

    def declined(self) -> tuple[str, Told] | None:
        """What this hospital last would not do: the code that it told, and the fault itself."""
        from client.daemon import told

        error = None if self._site is None else self._site.worker.declined
        return None if error is None else (told(error).label, _told(error))

    def own(self) -> Tensors:
        """Tensors of the model that are this hospital's alone."""
        return {} if self._site is None else self._site.worker.own()

    def spent(self) -> tuple[float, float] | None:
        """Epsilon and its cap, or None without a ledger."""
        if self._ledger is None:
            return None
        spending = self._ledger.spent()
        return spending.epsilon, spending.cap

    def close(self, *, finish: bool) -> None:
        """Let go of every file."""
        if self._site is not None:
            self._site.close(finish=finish)
            self._site = None
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


class _Carrier:
    """What Flower's engine takes to its own actors: which resident a node stands for."""

    def __init__(self, residents: Sequence[Any]) -> None:
        self._residents = tuple(residents)

    def __call__(self, context: Context) -> Any:
        """The party behind a node (`client.app.Party`)."""
        return partial(_carried, self._residents[int(context.node_config[_PARTITION])])


def _carried(
    resident: Any, question: Envelope, payloads: Sequence[bytes], *, hello: bool
) -> tuple[Envelope, tuple[bytes, ...]]:
    answer = ray.get(resident.answered.remote(question, tuple(payloads), hello=hello))
    if len(answer) == len(Told.__args__):  # type: ignore[attr-defined]
        raise _meant(answer)
    envelope, payloads = answer
    return envelope, tuple(payloads)


# ---------------------------------------------------------------------------- the run


@dataclass
class _Elsewhere:
    """`worker` of a hospital that lives elsewhere, as far as a run looks at it."""

    resident: Any

    @property
    def declined(self) -> WardroundError | None:
        """What it last would not do."""
        found = ray.get(self.resident.declined.remote())
        return None if found is None else _meant(found[1])

    def own(self) -> Tensors:
        """Tensors of the model that are its own alone."""
        found: Tensors = ray.get(self.resident.own.remote())
        return found


@dataclass
class _Remote:
    """A hospital's `Site`, as far as a run looks at it."""

    resident: Any

    @property
    def worker(self) -> _Elsewhere:
        """What it does its work with."""
        return _Elsewhere(self.resident)

    def declined_with(self, label: str) -> bool:
        """Whether that is what it told by this code."""
        found = ray.get(self.resident.declined.remote())
        return found is not None and found[0] == label

    def close(self, *, finish: bool = False) -> None:
        """Let go of its files."""
        ray.get(self.resident.close.remote(finish=finish))


@dataclass
class _Outward:
    """The coordinator's transport: the exchange, less what planned accidents swallow."""

    exchange: Exchange | None = None
    lost: Callable[[str], bool] = field(default=lambda _site: False)

    def send(self, recipient: str, payload: bytes) -> None:
        """Hand a message over."""
        if self.exchange is not None and not self.lost(recipient):
            self.exchange.send(recipient, payload)


class RayRun(SimulatedRun):
    """A simulation whose hospitals are Ray actors.

    Raises ConfigError where the study plans crashes: an actor of Ray's is not started again.
    """

    def __init__(
        self,
        federation: Federation,
        bundle: Bundle,
        paths: Paths,
        view: RunView,
        *,
        device: str = "auto",
    ) -> None:
        self._outward = _Outward()
        self._device = device
        self._over = threading.Event()
        self._remote: dict[str, _Remote] = {}
        super().__init__(federation, bundle, paths, view)
        if any(self._network.crashing.values()):
            self.close()
            raise ConfigError(
                Code.NOT_ON_RAY,
                "A hospital that crashes is not simulated on Ray; one that drops is.",
            )
        write_durably(paths.on_ray, [b""])

    def _transport(self) -> Transport:
        return self._outward

    def _open_ledgers(self) -> dict[str, Any]:
        """While the run goes on, every ledger is its hospital's alone."""
        return dict.fromkeys(self._names)

    def _epsilon(self) -> dict[str, tuple[float, float]]:
        asked = {v: site.resident.spent.remote() for v, site in self._remote.items()}
        spent = dict(zip(asked, ray.get(list(asked.values())), strict=True))
        return {v: found for v, found in spent.items() if found is not None}

    # ------------------------------------------------------------ playing

    def play(self) -> None:
        """Until the run is over. Raises AbortedRound where it cannot go on."""
        self._view.note("starting Ray and the hospitals")
        with _engine():
            residents = self._residents()
            self._remote = {name: _Remote(resident) for name, resident in residents.items()}
            # What a run asks of a site, these answer.
            self._sites.update(cast("dict[str, Site]", self._remote))
            for told in ray.get([resident.open.remote() for resident in residents.values()]):
                if told is not None:
                    raise _meant(told)
            bind(self._serve)
            self._simulated(tuple(residents.values()))
        self._ledgers = super()._open_ledgers()
        for name in self._names:
            Hosted(self._federation, self._bundle, self._paths, name).divide(self._ledgers[name])

    def _residents(self) -> dict[str, Any]:
        key = self._coordinator()
        remote = ray.remote(Resident).options(num_cpus=0, num_gpus=self._share())
        return {
            name: remote.remote(
                out=self._paths.root.absolute(),
                site=name,
                device=self._device,
                coordinator=key.public,
                roster=self._roster,
                keys_digest=self._keys_digest,
            )
            for name in self._names
        }

    def _coordinator(self) -> SiteKey:
        return site_key(self._paths.state / COORDINATOR, self._entropy)

    def _share(self) -> float:
        """How much of a GPU every hospital gets."""
        found = float(ray.cluster_resources().get("GPU", 0))
        if self._device == "cpu" or not found:
            return 0.0
        return min(1.0, math.floor(100 * found / len(self._names)) / 100)

    def _simulated(self, residents: Sequence[Any]) -> None:
        """Flower's engine, until its ServerApp ends."""
        from flwr.simulation import run_simulation

        # Its actors only wait for ours; one a hospital is enough.
        cpus = int(ray.cluster_resources().get("CPU", 1))
        resources = {"num_cpus": max(1, cpus // len(residents)), "num_gpus": 0.0}
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        try:
            run_simulation(
                server_app=app,
                client_app=shell_by_context(_Carrier(residents)),
                num_supernodes=len(residents),
                backend_config={"client_resources": resources},
            )
        finally:
            self._over.set()

    def _serve(self, grid: Any) -> None:
        """The ServerApp's work, in a thread of Flower's."""
        exchange = Exchange(
            grid,
            self._coordinator(),
            self._bundle.digest,
            self._roster,
            self._clock,
            registered=lambda _node: None,
            watch=Unwatched(),
            # Nobody is asked anew: an actor does not go away and come back.
            pace=Pace(poll_s=_POLL_S, look_s=_LOOK_S, silence_s=math.inf, linger_s=_LINGER_S),
            pause=lambda seconds: self._pause(exchange, seconds),
        )
        self._outward.exchange, self._outward.lost = exchange, self._lost
        finished = False
        try:
            exchange.serve(Tapped(self._driver, self._tap.see), self._ended)
            machine = self._driver.machine
            if machine.ended is not None:
                raise self._ended_early(machine.ended)
            finished = self._final is not None
        except AbortedRound as error:
            raise self._saved(error) from error
        finally:
            # Now, for Flower ends Ray with everything on it.
            self._collect()
            for site in self._remote.values():
                site.close(finish=finished)
            self._sites.clear()
            self._remote.clear()

    def _ended(self) -> bool:
        self._show()
        if self._starved is not None:
            raise self._starved
        return self._final is not None or self._over.is_set()

    def _pause(self, exchange: Exchange, seconds: float) -> None:
        """Where everybody is here and nobody works, the next deadline is now."""
        if exchange.quiet and all(p.online and not p.asked for p in exchange.presence().values()):
            self._clock.skip_to(self._driver.machine.next_wakeup)
        else:
            time.sleep(seconds)

    def _lost(self, name: str) -> bool:
        machine = self._driver.machine
        if machine.phase in _SAFE:
            return False
        return name in self._network.dropping.get(machine.record.round, ())


@contextlib.contextmanager
def _engine() -> Iterator[None]:
    """Ray, started here or joined where RAY_ADDRESS says; every worker finds this code."""
    path = os.pathsep.join(sys.path)
    ray.init(
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def on_ray(device: str) -> Callable[[Federation, Bundle, Paths, RunView], SimulatedRun]:
    """The engine for `server.simulate.simulate`."""
    return partial(RayRun, device=device)
