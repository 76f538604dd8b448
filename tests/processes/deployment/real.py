"""A federation of the product alone: the tabular example, `client run` and torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from federation import CODE, Federation, Zygote, merged

from common.bundle import Bundle, resolve
from common.config import load
from common.study import Study

SITES = ("east", "north", "south")
HOME = {"data": {"files": ["labs.csv"], "columns": {"patient": "patient", "label": "label"}}}


def tabular_bundle(rounds: int) -> Bundle:
    """The tabular example over three hospitals."""
    from client.build import build_model

    plain = load(CODE / "configs" / "tabular.yaml", Study)
    told: dict[str, Any] = plain.model_dump(mode="json", exclude={"simulation"})
    changes = {
        "training": {"rounds": rounds, "local_steps": 2, "spare_rounds": 20},
        "evaluation": {"every": rounds},
        "privacy": {"epsilon": 20.0, "delta": 1e-5},
        "deadlines": dict.fromkeys(
            ("handshake_s", "train_s", "upload_s", "agree_s", "unmask_s"), 60
        ),
    }
    told = merged(merged(told, changes), {"sites": [{"id": site} for site in SITES]})
    study = Study.model_validate_json(json.dumps(told))
    built = build_model(study)
    return resolve(study, built.initial, built.backbone_digest, built.config)


def real_federation(root: Path, zygote: Zygote | None) -> Federation:
    """Enrolled and approved, each hospital with its own records."""
    data = CODE / "configs" / "data" / "synthetic-labs.csv"
    with data.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for site in SITES:
        folder = root / "federation" / site
        folder.mkdir(parents=True)
        with (folder / "labs.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(row for row in rows if row["hospital"] == site)
    return Federation(
        root / "federation",
        sites=3,
        zygote=zygote,
        real=True,
        bundle=tabular_bundle(3),
        site_yaml=HOME,
    )
