"""Four hospitals of the tabular example, enrolled, each with its own folder and site.yaml."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.config import SiteConfig
from client.hospital import HospitalHost
from client.review import approve_study
from common.bundle import Bundle, resolve
from common.config import load
from common.crypto.identity import SiteKey
from common.keys import secret_file
from common.offer import Offer
from common.roster import Roster
from common.study import Study
from common.world import SkippingClock, SystemEntropy, write_durably

CONFIGS = Path(__file__).parents[3] / "configs"
SITES = ("east", "north", "south", "west")
NOW = 1_800_000_000


def _study(changes: Mapping[str, Any]) -> Study:
    plain = load(CONFIGS / "tabular.yaml", Study).model_dump(mode="json", exclude={"simulation"})
    plain["sites"] = [{"id": name} for name in SITES]
    plain["training"] |= {"rounds": 2, "local_steps": 2}
    plain["evaluation"] |= {"every": 2}
    plain["privacy"] |= {"epsilon": 8.0, "delta": 1e-5}
    for section, fields in changes.items():
        if isinstance(fields, Mapping):
            plain[section] = {**(plain[section] or {}), **fields}
        else:
            plain[section] = fields
    return Study.model_validate_json(json.dumps(plain))


def _bundle(changes: Mapping[str, Any]) -> Bundle:
    from client.build import build_model

    study = _study(changes)
    built = build_model(study)
    known = (built.initial, built.backbone_digest, built.config, built.personal)
    return resolve(study, *known)


@pytest.fixture(scope="session")
def bundle_of() -> Callable[..., Bundle]:
    """The tabular study of four hospitals, sections laid over it; each made once."""
    made: dict[str, Bundle] = {}

    def make(**changes: Any) -> Bundle:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            made[key] = _bundle(changes)
        return made[key]

    return make


@dataclass
class Consortium:
    """A coordinator's keys and four hospitals' folders."""

    root: Path
    coordinator: SiteKey
    keys: dict[str, SiteKey]
    bundle: Bundle
    hosts: dict[str, HospitalHost] = field(default_factory=dict)

    def yaml(self, site: str) -> Path:
        return self.root / site / "site.yaml"

    def state(self, site: str) -> Path:
        return self.root / site / "state"

    def config(self, site: str) -> SiteConfig:
        return load(self.yaml(site), SiteConfig)

    def change(self, site: str, **sections: Any) -> None:
        """Lay sections over a hospital's site.yaml."""
        plain = json.loads(self.yaml(site).read_text())
        for name, value in sections.items():
            merged = isinstance(value, dict) and isinstance(plain.get(name), dict)
            plain[name] = {**plain[name], **value} if merged else value
        self.yaml(site).write_text(json.dumps(plain))

    def publish(
        self,
        bundle: Bundle | None = None,
        *,
        name: str = "bundle",
        version: int = 1,
        signer: SiteKey | None = None,
        **keys: bytes,
    ) -> Path:
        """The bundle folder as the coordinator hands it out."""
        bundle = self.bundle if bundle is None else bundle
        signer = self.coordinator if signer is None else signer
        folder = self.root / name
        bundle.save(folder)
        members = {site: key.public for site, key in self.keys.items()} | keys
        roster = Roster.of(members, version)
        roster.signed(signer).save(folder / "roster.json")
        Offer.sign(signer, bundle.digest, roster.digest()).save(folder / "offer.json")
        return folder

    def approve(self, site: str, folder: Path | None = None, by: str = "Dr. Grey") -> bool:
        folder = self.publish() if folder is None else folder
        return approve_study(folder, self.config(site), self.yaml(site), by=by, now=NOW)[1]

    def host(self, site: str, **options: Any) -> HospitalHost:
        """The hospital's host, opened anew."""
        self.close(site)
        made = HospitalHost(
            self.config(site), self.yaml(site), coordinator=self.coordinator.public, **options
        )
        self.hosts[site] = made
        return made

    def close(self, *sites: str) -> None:
        for site in sites or tuple(self.hosts):
            host = self.hosts.pop(site, None)
            if host is not None:
                host.close()


def _write_site(root: Path, site: str) -> None:
    """Its rows with its own column names, and what it decides."""
    with (CONFIGS / "data" / "synthetic-labs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["hospital"] == site]
    names = ["pid", "age", "systolic", "crp", "heart_rate", "dx"]
    with (root / "labs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            told = row | {"pid": row["patient"], "dx": row["label"]}
            writer.writerow([told[name] for name in names])
    plain = {
        "format": "wardround-site/1",
        "site": site,
        "data": {"files": ["labs.csv"], "columns": {"patient": "pid", "label": "dx"}},
        "state": "state",
        "budget": {"epsilon": 12, "delta": 1e-5},
        "ceilings": {"epsilon": 10, "delta": 1e-5, "rounds": 20, "approved_studies": []},
        "device": "cpu",
    }
    (root / "site.yaml").write_text(json.dumps(plain))


def _enrol(state: Path, coordinator: SiteKey, site: str) -> SiteKey:
    """What `client join` leaves behind."""
    state.mkdir(mode=0o700)
    key = SiteKey.from_seed(secret_file(state / "identity.key", SystemEntropy()))
    secret_file(state / "vault.key", SystemEntropy())
    pin = {
        "format": "wardround-pinned/1",
        "consortium": "test",
        "coordinator": coordinator.public.hex(),
        "url": "localhost:8443",
        "site": site,
        "name": site.title(),
        "version": 1,
        "issued": NOW,
    }
    write_durably(state / "coordinator.json", [json.dumps(pin).encode()])
    return key


@pytest.fixture
def consortium(tmp_path: Path, bundle_of: Callable[..., Bundle]) -> Any:
    """Four enrolled hospitals; nothing is approved yet."""
    coordinator = SiteKey.generate(SystemEntropy())
    keys: dict[str, SiteKey] = {}
    for site in SITES:
        (tmp_path / site).mkdir()
        _write_site(tmp_path / site, site)
        keys[site] = _enrol(tmp_path / site / "state", coordinator, site)
    made = Consortium(tmp_path, coordinator, keys, bundle_of())
    yield made
    made.close()


class Local:
    """A trainer in this process, for the hospitals whose child is not what is tested."""

    def __init__(self, task: Any, entropy: Any = None) -> None:
        from client.trainer import _trainer

        self.task = task
        self._inner = _trainer(
            {**task.fields(), "split": task.split_key},
            task.bundle,
            SystemEntropy() if entropy is None else entropy,
        )

    def ready(self) -> None:
        pass

    def close(self) -> None:
        pass

    def train(self, state, round_number):
        return self._inner.train(state, round_number)

    def measure(self, state, round_number):
        return self._inner.measure(state, round_number)

    def statistics(self):
        return self._inner.statistics()

    def export(self, folder, state):
        from client.federation import export_final

        export_final(folder, self.task.bundle.study, state)


@pytest.fixture(scope="session")
def local() -> Any:
    """Makes trainers in this process."""
    import torch

    torch.set_num_threads(1)
    return Local


class Fleet:
    """A coordinator over hosts in this process: every message is one question."""

    def __init__(self, consortium: Consortium, folder: Path) -> None:
        from common.world import FileJournal
        from server.driver import CoordinatorDriver
        from server.network import InProcessNetwork, SiteHandle, WireTap
        from server.round.machine import CoordinatorRound
        from server.round.state import Deadlines

        self.consortium = consortium
        self.study = consortium.bundle.digest
        publics = {site: key.public for site, key in consortium.keys.items()}
        terms = consortium.bundle.terms(publics)
        self.clock = SkippingClock()
        self.network = InProcessNetwork(self.clock, WireTap(terms.upload_bytes()))
        self.completed: list[Any] = []
        self.codes: list[tuple[str, Any]] = []
        self.final: Any = None
        self.before: Callable[[str], None] = lambda site: None
        self._journal = FileJournal(folder)
        machine = CoordinatorRound(
            terms,
            Deadlines(60, 60, 60, 60, 60),
            SystemEntropy(),
            patience=6,
            record=None,
            blob=self._journal.get_blob,
        )
        self.driver = CoordinatorDriver(
            machine,
            journal=self._journal,
            transport=self.network,
            clock=self.clock,
            evidence=_Silent(),
            observer=_Observer(self),
        )
        self.network.driver = self.driver
        for site in SITES:
            self.network.sites[site] = SiteHandle(
                lambda site=site: self._ask(site, (), hello=True),
                lambda payload, site=site: self._ask(site, (payload,), hello=False),
                lambda: None,
                up=True,
            )

    def _ask(self, site: str, payloads: tuple[bytes, ...], *, hello: bool) -> None:
        from common.errors import WardroundError

        self.before(site)
        host = self.consortium.hosts.get(site)
        if host is None:
            return
        try:
            answer = host.ask(self.study, payloads, hello=hello)
        except WardroundError as error:
            self.codes.append((site, error.code))
            return
        if answer.code is not None:
            self.codes.append((site, answer.code))
        for payload in answer.payloads:
            self.network.post(site, payload)

    def run(self, *, rounds: int | None = None) -> None:
        """Until the run is over, or so many rounds are complete."""
        for handle in self.network.sites.values():
            handle.start()
        self.driver.start()
        for _ in range(5000):
            if self.final is not None and self.network.quiet:
                return
            if rounds is not None and len(self.completed) >= rounds:
                return
            self.network.step()
        raise AssertionError("the run does not end")

    def close(self) -> None:
        self._journal.close()


class _Silent:
    def record(self, event: str, fields: Any) -> None:
        pass


class _Observer:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def completed(self, result: Any, chain: Any) -> None:
        self._fleet.completed.append(result)

    def aborted(self, result: Any) -> None:
        self._fleet.codes.append(("", result.code))

    def refused(self, site: str, code: Any) -> None:
        self._fleet.codes.append((site, code))

    def over(self, chain: Any) -> None:
        self._fleet.final = copy.copy(chain)


@pytest.fixture
def fleet(consortium: Consortium, tmp_path: Path) -> Any:
    """A coordinator for the consortium's own study."""
    made = Fleet(consortium, tmp_path / "coordinator")
    yield made
    made.close()
