"""What secure aggregation costs: CPU seconds against the cipher's own speed and against Flower.

    python benchmarks/secagg.py [--dim 110000000] [--parties 10] [--json FILE]

The floor is the time that AES-256-CTR alone needs for the mask bytes, at the rate measured
right before and after each line. Everything is single-threaded process CPU time of one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.crypto.digest import decode, encode
from common.crypto.mask import add_stream, add_streams
from common.secagg.masking import Lane, add_packed, masked_planes, planes_over

BLOCK = 256 << 10
TENSORS = 200
GOALS = {
    "masking_alone": 1.35,
    "client_path_32": 2.2,
    "flower_over_ours": 7.0,
    "upload_bytes_per_parameter_24": 3.0,
    "coordinator_peak_30_over_5": 1.1,
}


def cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def cipher_rate(total: int = 512 << 20) -> float:
    """Bytes per CPU second of OpenSSL's AES-256-CTR in 256 KiB blocks."""
    context = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    zeros, output = bytes(BLOCK), bytearray(BLOCK + 16)

    def work() -> None:
        for _ in range(total // BLOCK):
            context.update_into(zeros, output)

    return total / cpu(work)


def against_floor(mask_bytes: int, work: Callable[[], object]) -> tuple[float, float, float]:
    """CPU seconds of `work`, the floor, and their ratio."""
    before = cipher_rate()
    seconds = cpu(work)
    floor = mask_bytes / ((before + cipher_rate()) / 2)
    return seconds, floor, seconds / floor


def tensor_sizes(dim: int) -> list[int]:
    return [dim // TENSORS] * (TENSORS - 1) + [dim - dim // TENSORS * (TENSORS - 1)]


# ------------------------------------------------------------------------------------ client
def client(dim: int, parties: int) -> dict[str, Any]:
    """Masking alone, and the whole path from update to hashed planes, three ways of memory."""
    rng = np.random.default_rng(0)
    original = rng.standard_normal(dim, np.float32)
    original *= np.float32(0.01)
    update = original.copy()
    keys = [os.urandom(32) for _ in range(parties)]  # the self mask and one per peer
    signs = [1 if number % 2 else -1 for number in range(parties)]
    sizes = tensor_sizes(dim)
    mask_bytes = 4 * dim * parties
    results: dict[str, Any] = {}
    words = np.ones(dim, np.uint32)
    results["masking_alone"] = against_floor(mask_bytes, partial(add_streams, words, keys, signs))
    spare = [np.ones(dim, "<u2"), np.ones(dim, np.uint8)]
    for bits, kept in ((32, [words]), (24, spare)):
        path = partial(
            masked_planes,
            update,
            exponents=[21 if bits == 32 else 13] * len(sizes),
            sizes=sizes,
            bits=bits,
            parties=parties,
            keys=keys,
            signs=signs,
        )
        over = planes_over(update, bits)
        results[f"client_path_{bits}"] = against_floor(mask_bytes, partial(path, out=over))
        np.copyto(update, original)
        results[f"client_path_{bits}_kept_buffers"] = against_floor(
            mask_bytes, partial(path, out=kept)
        )
        results[f"client_path_{bits}_new_buffers"] = against_floor(mask_bytes, path)
        results[f"upload_bytes_per_parameter_{bits}"] = sum(p.nbytes for p in over) / dim
        del over
    return results


# ------------------------------------------------------------------------------------ Flower
def flower_client(dim: int, parties: int) -> float:
    """CPU seconds of Flower's SecAgg+ client from update to upload, prepared by its own code."""
    from flwr.app import ConfigRecord
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    # The package re-exports a function under the module's own name.
    secagg = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    setup = ConfigRecord(
        {
            Key.SAMPLE_NUMBER: parties,
            Key.SHARE_NUMBER: parties,
            Key.THRESHOLD: parties * 2 // 3 + 1,
            Key.CLIPPING_RANGE: 8.0,
            Key.TARGET_RANGE: 1 << 22,
            Key.MOD_RANGE: 1 << 32,
            Key.MAX_WEIGHT: 1000.0,
        }
    )
    states = [secagg.SecAggPlusState() for _ in range(parties)]
    public = {}
    for nid, state in enumerate(states):
        state.nid = nid
        keys = secagg._setup(state, setup)  # noqa: SLF001 - the path that is measured
        public[str(nid)] = (keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2])
    sources, ciphertexts = [], []
    for nid, state in enumerate(states):
        shared = secagg._share_keys(state, public)  # noqa: SLF001
        for target, text in zip(
            shared[Key.DESTINATION_LIST], shared[Key.CIPHERTEXT_LIST], strict=True
        ):
            if target == 0:
                sources.append(nid)
                ciphertexts.append(text)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s, np.float32) * np.float32(0.01) for s in tensor_sizes(dim)]
    parameters = ndarrays_to_parameters(arrays)
    del arrays
    configs = {Key.CIPHERTEXT_LIST: ciphertexts, Key.SOURCE_LIST: sources}
    return cpu(lambda: secagg._collect_masked_vectors(states[0], configs, 500, parameters))  # noqa: SLF001


# ------------------------------------------------------------------------------- coordinator
def coordinator_peak(dim: int, parties: int) -> int:
    """Peak bytes while the coordinator receives, adds and unmasks `parties` uploads."""
    lane = Lane(0, 24, dim)
    self_keys = [os.urandom(32) for _ in range(parties)]
    tracemalloc.start()
    total = lane.zeros()
    for _ in range(parties):
        message = encode({"planes": [os.urandom(size) for size in lane.plane_bytes]})
        received = decode(message, max_bytes=len(message), views=True)
        add_packed(total, received["planes"], lane.bits)  # type: ignore[index]
        del message, received
    for key in self_keys:
        add_stream(total, key, subtract=True)
    return tracemalloc.get_traced_memory()[1]


def coordinator_peaks(dim: int) -> dict[int, int]:
    """`coordinator_peak` in a process of its own for 5 and for 30 parties."""
    peaks = {}
    for parties in (5, 30):
        command = [sys.executable, __file__, "--peak-of", str(parties), "--memory-dim", str(dim)]
        here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(command, capture_output=True, check=True, text=True, env=here)
        peaks[parties] = int(done.stdout)
    return peaks


# ------------------------------------------------------------------------------------ report
def verdict(name: str, value: float) -> str:
    goal = GOALS.get(name)
    if goal is None:
        return ""
    met = value >= goal if name == "flower_over_ours" else value <= goal
    sign = ">=" if name == "flower_over_ours" else "<="
    return f"goal {sign} {goal:g}: {'met' if met else 'MISSED'}"


def line(name: str, value: float, note: str = "") -> None:
    print(f"{name:34} {value:10.3f}   {verdict(name, value):24} {note}")


def report(args: argparse.Namespace) -> dict[str, Any]:
    dim, parties = args.dim, args.parties
    print(f"d = {dim:,} parameters, n = {parties}; CPU seconds of one run, one thread\n")
    results: dict[str, Any] = {"dim": dim, "parties": parties, "goals": GOALS}
    for name, value in client(dim, parties).items():
        if isinstance(value, tuple):
            seconds, floor, ratio = value
            results[name] = {"cpu_seconds": seconds, "floor_seconds": floor, "ratio": ratio}
            line(name, ratio, f"x floor   ({seconds:.3f} s / {floor:.3f} s)")
        else:
            results[name] = value
            line(name, value)
    if not args.no_flower:
        seconds = flower_client(args.flower_dim, parties)
        scaled = seconds * dim / args.flower_dim
        ratio = scaled / results["client_path_32"]["cpu_seconds"]
        results["flower"] = {"dim": args.flower_dim, "cpu_seconds": seconds, "scaled": scaled}
        results["flower_over_ours"] = ratio
        how = f"measured at d = {args.flower_dim:,}, scaled linearly"
        line("flower_over_ours", ratio, f"({scaled:.2f} s against k = 32; {how})")
    peaks = coordinator_peaks(args.memory_dim)
    results["coordinator_peak_bytes"] = peaks
    results["coordinator_peak_30_over_5"] = peaks[30] / peaks[5]
    note = f"({peaks[5] / 2**20:.0f} and {peaks[30] / 2**20:.0f} MiB at d = {args.memory_dim:,})"
    line("coordinator_peak_30_over_5", peaks[30] / peaks[5], note)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dim", type=int, default=110_000_000)
    parser.add_argument("--parties", type=int, default=10)
    parser.add_argument("--flower-dim", type=int, default=22_000_000)
    parser.add_argument("--memory-dim", type=int, default=11_000_000)
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's path out")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    parser.add_argument("--peak-of", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of is not None:
        print(coordinator_peak(args.memory_dim, args.peak_of))
        return
    results = report(args)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
