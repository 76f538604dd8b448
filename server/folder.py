"""The output folder of a run: its places, and what can be said of it without running anything.

OUT/state/                the study, its bundle, history, everybody's keys, journals, ledgers
OUT/audit/                one log per party, and the public keys
OUT/wardround.log.jsonl   what happened, event by event, for looking
OUT/model/ metrics.json privacy.json MODEL_CARD.md plots/ manifest.json
OUT/model-so-far/         instead of model/, where a run had to end early
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import load
from common.errors import Code, ConfigError, StorageError
from common.study import Study
from common.world import make_folder, write_durably

__all__ = ["Paths", "keep_study", "kept_json", "origin", "require_room", "study_of"]

STUDY_FILE = "study.yaml"
_ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Paths:
    """The output folder's places."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything that a resume needs."""
        return self.root / "state"

    @property
    def on_ray(self) -> Path:
        """There where the hospitals of the run live on Ray; a resume goes on there."""
        return self.state / "on-ray"

    @property
    def bundle(self) -> Path:
        """The study bundle."""
        return self.state / "bundle"

    @property
    def audit(self) -> Path:
        """The audit logs."""
        return self.root / "audit"

    @property
    def model(self) -> Path:
        """The Hugging Face folder."""
        return self.root / "model"

    @property
    def history(self) -> Path:
        """What became of every round."""
        return self.state / "history.jsonl"

    @property
    def log(self) -> Path:
        """The log for looking."""
        return self.root / "wardround.log.jsonl"

    @property
    def manifest(self) -> Path:
        """What was divided, and how."""
        return self.root / "manifest.json"

    @property
    def so_far(self) -> Path:
        """The model of a run that had to end early."""
        return self.root / "model-so-far"

    @property
    def conclusion(self) -> Path:
        """What was said at the end; its presence says that the run is over."""
        return self.state / "conclusion.json"

    def site(self, name: str) -> Path:
        """A hospital's own folder."""
        return self.state / "sites" / name


def require_room(paths: Paths, study: Study, config: Path) -> None:
    """The study is a simulation, and the folder is new, empty, or holds nothing but its files.

    Raises ConfigError, StorageError.
    """
    if study.simulation is None:
        raise ConfigError(
            Code.NO_SIMULATION, f"The study {study.name} has no section `simulation`."
        )
    found = {path.resolve() for path in paths.root.iterdir()} if paths.root.is_dir() else set()
    data = study.simulation.data.files
    own = {config.resolve(), *((config.parent / name).resolve() for name in data)}
    if found - own:
        there = (paths.state / STUDY_FILE).exists()
        raise StorageError(
            Code.OUTPUT_NOT_EMPTY,
            f"{paths.root}: {'there is a run in it' if there else 'is not empty'}.",
            remedy="Name another folder with --out"
            + (f", or type: wardround resume {paths.root}" if there else "."),
        )


def keep_study(config: Path, paths: Paths, *, compare: bool) -> None:
    """What a resume needs; the study comes last, so that a folder with it has all of it."""
    make_folder(paths.state)
    try:
        text = config.read_bytes()
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{config}: cannot be kept with the run ({error.strerror})."
        ) from None
    origin = {"config": str(config.resolve()), "compare": compare}
    write_durably(paths.state / _ORIGIN_FILE, [json.dumps(origin).encode()])
    write_durably(paths.state / STUDY_FILE, [text])


def origin(paths: Paths) -> tuple[Path, bool]:
    """Where the study's file was, and whether hospitals also train alone."""
    found = kept_json(paths.state / _ORIGIN_FILE)
    return Path(found["config"]), bool(found["compare"])


def study_of(out: Path) -> Study:
    """The study of a run's folder. Raises StorageError where there is none."""
    kept = Paths(out).state / STUDY_FILE
    if not kept.is_file():
        raise StorageError(Code.NOT_A_RUN, f"{out}: there is no run here.")
    return load(kept, Study)


def kept_json(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote about itself. Raises StorageError where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise StorageError(Code.JOURNAL_DAMAGED, f"{path}: is missing or damaged.")
    return found
