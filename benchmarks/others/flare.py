"""NVIDIA FLARE's simulator: its FedAvg, every hospital in a process of its own.

python benchmarks/others/flare.py [--rounds 20]       with benchmarks on PYTHONPATH
"""

from __future__ import annotations

import json
from pathlib import Path

from others import harness


def main() -> None:
    rounds = harness.begin(__doc__, "nvflare", "torch")
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.app_opt.pt.job_config.model import PTModel
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import ScriptRunner

    from others import workload
    from others.flare_server import Rounds

    final = Path.cwd() / "final.json"
    job = FedJob(name="fedavg", min_clients=workload.SITES)
    job.to_server(FedAvg(num_clients=workload.SITES, num_rounds=rounds))
    job.to_server(PTModel(workload.Mlp()))
    job.to_server(Rounds(rounds=rounds, final=str(final)), id="rounds")
    job.to_clients(ScriptRunner(script=str(Path(__file__).with_name("flare_site.py"))))
    harness.ready()
    # As many threads as hospitals, the default: with fewer, a process starts at every turn.
    job.simulator_run(
        str(Path.cwd() / "simulation"), n_clients=workload.SITES, threads=workload.SITES
    )
    harness.told(rounds, workload.loss_of(json.loads(final.read_text())), "nvflare")


if __name__ == "__main__":
    main()
