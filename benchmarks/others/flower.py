"""Flower's simulation engine (flwr with ray): FedAvg over the message API.

python benchmarks/others/flower.py [--rounds 20]      with benchmarks on PYTHONPATH
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from others import harness, workload


def train(message: Any, context: Any) -> Any:
    """A hospital's turn."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    model = workload.Mlp()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    workload.train(model, int(context.node_config["partition-id"]))
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": workload.ROWS}),
        }
    )
    return Message(content=content, reply_to=message)


def main() -> None:
    rounds = harness.begin(__doc__, "flwr", "ray", "torch")
    import ray  # noqa: F401 - its import is not part of the first round
    from flwr.app import ArrayRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    latest: list[Any] = []

    def evaluate(number: int, arrays: Any) -> None:
        latest[:] = [arrays]
        if number:
            harness.round_done(number, rounds)

    def serve(grid: Any, context: Any) -> None:
        del context
        every = workload.SITES
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=every, min_available_nodes=every)
        first = ArrayRecord(workload.Mlp().state_dict())
        strategy.start(grid, first, num_rounds=rounds, evaluate_fn=evaluate)

    client, server = ClientApp(), ServerApp()
    client.train()(train)
    server.main()(serve)
    harness.ready()
    run_simulation(
        server,
        client,
        num_supernodes=workload.SITES,
        # A worker process for each core; the default is one for every two.
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"_temp_dir": str(Path.cwd())},
        },
    )
    harness.told(rounds, workload.loss_of(latest[0].to_torch_state_dict()), "flwr")


if __name__ == "__main__":
    main()
