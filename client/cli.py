"""The verbs of the hospital's package; heavy imports happen in `run`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.cli import Command, emit_json, say, table


def _configure_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--out", type=Path, default=None, help="bundle folder (default: NAME-bundle)"
    )


def _build(arguments: argparse.Namespace) -> int:
    from common.config import load
    from common.study import Study

    study = load(arguments.study, Study)
    # The data first: a fault in it is told before torch is loaded.
    from client.holdings import study_with_sites

    study = study_with_sites(study, arguments.study)
    from client.knowledge.shelf import read_knowledge

    read_knowledge(study.task, arguments.study.parent)
    from client.federation import build_bundle

    bundle, engine = build_bundle(study)
    folder = arguments.out or Path(f"{study.name}-bundle")
    bundle.save(folder)
    told: dict[str, Any] = {
        "bundle": str(folder),
        "digest": bundle.digest.hex(),
        "parameters": bundle.layout.size,
        "tensors": len(bundle.layout.specs),
        "backbone": bundle.backbone_digest.hex(),
        "noise_multiplier": bundle.noise_multiplier,
        "engine": engine or None,
        "sites": [s.id for s in study.sites],
    }
    if arguments.json:
        emit_json(told)
        return 0
    say(f"study digest {told['digest']}")
    say(f"{told['parameters']} trainable parameters in {told['tensors']} tensors")
    if engine:
        say(f"clipped sums by {engine}")
    say(f"bundle: {folder}")
    say(f"next: wardround plan {folder}")
    return 0


def _configure_predict(parser: argparse.ArgumentParser) -> None:
    add_record_arguments(
        parser,
        patient="a column to carry over",
        file="CSV, NDJSON or Parquet with the notes or the features; or a site.yaml, for every "
        "stay of the system that it names",
    )
    parser.add_argument("--out", type=Path, default=None, help="where predictions go")


def add_record_arguments(
    parser: argparse.ArgumentParser,
    *,
    patient: str,
    file: str = "CSV, NDJSON or Parquet with the notes or the features",
) -> None:
    """What a saved model is asked about: the model, the records, and where it computes.

    `patient`: what its column is for. `file`: what it may be.
    """
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("file", type=Path, help=file)
    parser.add_argument(
        "--with",
        dest="beside",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a further file of the same records: measurements by the hour",
    )
    parser.add_argument(
        "--knowledge",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="where the edge files of the model's knowledge graph lie",
    )
    parser.add_argument("--text", default="text", help="name of the notes' column")
    parser.add_argument("--patient", default=None, help=patient)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _predict(arguments: argparse.Namespace) -> int:
    from client.predict import predict

    out = arguments.out or arguments.file.with_name(
        arguments.file.name.split(".")[0] + "-predictions.csv"
    )
    count = predict(
        arguments.model,
        arguments.file,
        out,
        beside=arguments.beside,
        knowledge=arguments.knowledge,
        text=arguments.text,
        patient=arguments.patient,
        device=arguments.device,
    )
    if arguments.json:
        emit_json({"predictions": count, "output": str(out)})
    else:
        say(f"{count} predictions in {out}")
    return 0


def _configure_privacy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a run's output folder, or a site's state folder")


def _privacy(arguments: argparse.Namespace) -> int:
    from client.budget import budget_report

    report = budget_report(arguments.folder)
    if arguments.json:
        emit_json(report.to_json())
        return 0
    table(report.columns, report.rows())
    for note in report.notes:
        say(note)
    return 0


COMMANDS = [
    Command(
        "study build",
        "resolve a study into the bundle that hospitals approve",
        _configure_build,
        _build,
    ),
    Command("predict", "label notes with a trained model", _configure_predict, _predict),
    Command(
        "privacy", "what the privacy ledgers say, and what is left", _configure_privacy, _privacy
    ),
]
