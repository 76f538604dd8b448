"""An enrolled consortium over the tabular example: what every way through Flower starts from."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.config import SiteConfig
from client.enrol import join
from client.review import approve_study
from common.bundle import Bundle, resolve
from common.config import load
from common.study import Study
from common.world import SystemEntropy, make_folder
from server.config import CoordinatorConfig
from server.deploy import RunFolder, prepare
from server.enrol import admit, coordinator_key, initialise, invite, publish

CODE = Path(__file__).parents[2]
CONFIGS = CODE / "configs"
SITES = ("east", "north", "south")
COLUMNS = ("patient", "age", "systolic", "crp", "heart_rate", "label")


def small_study(**changes: Mapping[str, Any]) -> Study:
    """The tabular example among three hospitals: one round of two steps."""
    plain = load(CONFIGS / "tabular.yaml", Study).model_dump(mode="json", exclude={"simulation"})
    plain["sites"] = [{"id": site} for site in SITES]
    plain["task"] |= {"hidden": []}
    plain["training"] |= {"rounds": 1, "local_steps": 2}
    plain["evaluation"] |= {"every": 1}
    plain["privacy"] |= {"epsilon": 8.0, "delta": 1e-5}
    for section, fields in changes.items():
        plain[section] = {**(plain[section] or {}), **fields}
    return Study.model_validate_json(json.dumps(plain))


def small_bundle(**changes: Mapping[str, Any]) -> Bundle:
    from client.build import build_model

    study = small_study(**changes)
    built = build_model(study)
    return resolve(study, built.initial, built.backbone_digest, built.config)


class Consortium:
    """A coordinator and three hospitals: enrolled, the study published and approved."""

    def __init__(self, root: Path, bundle: Bundle) -> None:
        self.root, self.bundle = root, bundle
        self.state = root / "coordinator"
        self.now = int(time.time())  # noqa: TID251 - invites expire by the wall clock
        plain = {
            "format": "wardround-coordinator/1",
            "state": "coordinator",
            "names": ["localhost"],
            "listen": {"host": "127.0.0.1", "port": 8443},
            "admin": {"host": "127.0.0.1", "port": 9443},
        }
        (root / "coordinator.yaml").write_text(json.dumps(plain))
        self.config = load(root / "coordinator.yaml", CoordinatorConfig)
        initialise(self.config, self.state, now=self.now, entropy=SystemEntropy())
        for site in SITES:
            self._enrol(site)
        published = root / "bundle"
        bundle.save(published)
        publish(self.state, published)
        for site in SITES:
            config = load(self.yaml(site), SiteConfig)
            approve_study(published, config, self.yaml(site), by="Dr. Grey", now=self.now)

    def _enrol(self, site: str) -> None:
        entropy = SystemEntropy()
        issued = invite(
            self.state,
            self.config,
            name=site.title(),
            site=site,
            url="localhost:8443",
            days=7,
            now=self.now,
            entropy=entropy,
        )
        make_folder(self.root / site)
        joined = join(self.home(site), issued, now=self.now, entropy=entropy)
        admit(self.state, joined.answer, self.now, said=joined.answer.words)
        self._write_site(site)

    def _write_site(self, site: str) -> None:
        with (CONFIGS / "data" / "synthetic-labs.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["hospital"] == site]
        with (self.root / site / "labs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows([row[name] for name in COLUMNS] for row in rows)
        plain = {
            "format": "wardround-site/1",
            "site": site,
            "data": {"files": ["labs.csv"], "columns": {"patient": "patient", "label": "label"}},
            "state": "state",
            "budget": {"epsilon": 12, "delta": 1e-5},
            "ceilings": {"epsilon": 10, "delta": 1e-5, "rounds": 20, "approved_studies": []},
            "device": "cpu",
        }
        self.yaml(site).write_text(json.dumps(plain))

    def yaml(self, site: str) -> Path:
        return self.root / site / "site.yaml"

    def home(self, site: str) -> Path:
        return self.root / site / "state"

    def prepared(self) -> RunFolder:
        """The coordinator's folder of the run."""
        return prepare(self.state, self.root / "bundle", coordinator_key(self.state).public)
