"""What an operator sees of a running coordinator: its status, metrics and health.

A status is a snapshot in a file of the state folder, so that `wardround server status` needs no
port and still tells, after a crash, what was going on last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import Code, StorageError
from common.world import write_durably

if TYPE_CHECKING:
    import grpc
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = [
    "FRESH_SECONDS",
    "Health",
    "RunStatus",
    "SiteStatus",
    "keep",
    "kept",
    "registry",
    "serving",
]

STATUS_FILE = "status.json"
FORMAT = "wardround-status/1"
# Its core writes to standard error, past every log; our own errors say what went wrong.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# A coordinator that has not turned its loop for this long is not healthy.
FRESH_SECONDS = 15.0
# The gRPC health service's name of ours; the empty name answers for the whole process.
HEALTH_SERVICE = "wardround.coordinator"
_PROBE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """One hospital, as the coordinator sees it.

    Attributes:
        state: offline, waiting (for its approval, say), asked, answered, done, revoked.
        code: the last code it told, empty where it told none.

    Units:
        heard: seconds since its node was last heard; None where it never was.
    """

    site: str
    state: str
    online: bool
    heard: float | None
    bytes_up: int
    bytes_down: int
    code: str = ""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at one moment.

    Units:
        at: Unix seconds. deadline, ends: seconds from `at`; None where nobody can say.
        turn, turns: training rounds, the one under way and how many there are.
    """

    at: int
    study: str
    digest: str
    run: str
    phase: str
    round: int
    kind: str
    turn: int
    turns: int
    completed: int
    aborted: int
    rejected: int
    quorum: int
    waiting_for: tuple[str, ...]
    deadline: float | None
    ends: float | None
    refused: Mapping[str, int]
    sites: tuple[SiteStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of the status file."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> RunStatus:
        """The status in what `to_json` gave. Raises ValueError where it is not one."""
        try:
            fields = {name: value for name, value in found.items() if name != "format"}
            fields["sites"] = tuple(SiteStatus(**site) for site in fields["sites"])
            fields["waiting_for"] = tuple(fields["waiting_for"])
            return RunStatus(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not a status") from error


def keep(state: Path, status: RunStatus) -> None:
    """Write the status file. Raises StorageError."""
    data = json.dumps(status.to_json(), allow_nan=False).encode()
    write_durably(state / STATUS_FILE, [data], durable=False)


def kept(state: Path) -> RunStatus:
    """The last status. Raises StorageError: NOT_A_RUN where no run was ever started here."""
    path = state / STATUS_FILE
    if not path.exists():
        raise StorageError(
            Code.NOT_A_RUN,
            f"{state}: no run was started here.",
            remedy="Start one: wardround server run BUNDLE",
        )
    try:
        return RunStatus.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        raise StorageError(Code.JOURNAL_DAMAGED, f"{path}: is damaged.") from None


# ------------------------------------------------------------------------------- metrics


class _RunCollector:
    """Turns the newest status into Prometheus metrics whenever somebody scrapes."""

    def __init__(self, status: Callable[[], RunStatus | None]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the run, by site where that is meant."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status()
        if status is None:
            return
        for name, text, value in _plain_gauges(status):
            yield GaugeMetricFamily(f"wardround_{name}", text, value=value)
        phase = GaugeMetricFamily(
            "wardround_phase", "1 for the phase that the round is in", labels=["phase"]
        )
        phase.add_metric([status.phase], 1)
        yield phase
        refused = CounterMetricFamily(
            "wardround_refused", "messages and refusals, by code", labels=["code"]
        )
        for code, count in status.refused.items():
            refused.add_metric([code], count)
        yield refused
        for name, text, read in _SITE_GAUGES:
            family = GaugeMetricFamily(f"wardround_site_{name}", text, labels=["site"])
            for site in status.sites:
                found = read(site)
                if found is not None:
                    family.add_metric([site.site], found)
            yield family


def _plain_gauges(status: RunStatus) -> Iterator[tuple[str, str, float]]:
    yield "rounds_completed", "rounds that ended in an aggregate", status.completed
    yield "rounds_aborted", "rounds that ended without one", status.aborted
    yield "models_rejected", "models that the acceptance gate rolled back", status.rejected
    yield "rounds_planned", "training rounds of the study", status.turns
    yield "round", "number of the round under way", status.round
    yield "quorum", "hospitals that must agree", status.quorum
    yield "waiting_for", "hospitals whose answer the phase still needs", len(status.waiting_for)
    yield "status_timestamp_seconds", "when this was true, Unix time", status.at
    if status.deadline is not None:
        yield "phase_deadline_seconds", "seconds until the phase is closed", status.deadline


_SITE_GAUGES: tuple[tuple[str, str, Callable[[SiteStatus], float | None]], ...] = (
    ("online", "1 while the hospital's daemon is heard", lambda s: float(s.online)),
    ("heard_age_seconds", "seconds since it was last heard", lambda s: s.heard),
    ("bytes_up", "bytes received from it", lambda s: s.bytes_up),
    ("bytes_down", "bytes sent to it", lambda s: s.bytes_down),
)


def registry(status: Callable[[], RunStatus | None]) -> CollectorRegistry:
    """A Prometheus registry of this run and of the process."""
    from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

    made = CollectorRegistry()
    made.register(_RunCollector(status))
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    return made


# ------------------------------------------------------------------------------- health


def serving(port: int) -> bool:
    """What the health service on this machine's `port` says; False where nobody answers."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        request = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
        try:
            answer = ask(request, timeout=_PROBE_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class Health:
    """The standard gRPC health service on the coordinator's loopback.

    Guarantee: SERVING only while `fresh` was called with True within the last call; the caller
    says so when its loop has turned lately, not when a process merely exists.
    """

    def __init__(self, port: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc

        self._words = health_pb2.HealthCheckResponse
        self._servicer = health.HealthServicer()
        self._server: grpc.Server = grpc.server(
            ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)]
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        self.fresh(serving=False)
        try:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError:
            raise StorageError(
                Code.PORT_TAKEN,
                f"127.0.0.1:{port}: the health service cannot listen there.",
            ) from None
        self._server.start()

    def fresh(self, *, serving: bool) -> None:
        """What the next probe is told."""
        told = self._words.SERVING if serving else self._words.NOT_SERVING
        for name in ("", HEALTH_SERVICE):
            self._servicer.set(name, told)

    def stop(self) -> None:
        """Stop answering."""
        self._server.stop(0).wait()
