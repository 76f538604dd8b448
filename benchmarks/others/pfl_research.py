"""pfl-research's simulated backend: federated averaging in one process.

python benchmarks/others/pfl_research.py [--rounds 20]      with benchmarks on PYTHONPATH
"""

from __future__ import annotations

from typing import Any

from others import harness


def main() -> None:
    rounds = harness.begin(__doc__, "pfl", "torch")
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    from others import workload

    class Mlp(workload.Mlp):
        """The model, as pfl asks for it."""

        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(inputs), targets)

        def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
            with torch.no_grad():
                return {
                    "loss": Weighted(self.loss(inputs, targets).item() * len(inputs), len(inputs))
                }

    class Rounds(TrainingProcessCallback):  # type: ignore[misc]  # untyped
        """Notes every round."""

        def after_central_iteration(
            self,
            aggregate_metrics: Any,  # noqa: ARG002 - pfl names it
            model: Any,  # noqa: ARG002 - pfl names it
            *,
            central_iteration: int,
        ) -> tuple[bool, Any]:
            harness.round_done(central_iteration + 1, rounds)
            return False, Metrics()

    harness.ready()
    torch.set_num_threads(1)
    module = Mlp()
    users = FederatedDataset(
        lambda number: PyTorchTensorDataset(workload.hospital(number), user_id=str(number)),
        # Every hospital once a round: the sampler goes round, and a cohort is all of them.
        get_user_sampler("minimize_reuse", list(range(workload.SITES))),
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,  # only in the first round, which is always measured
            train_cohort_size=workload.SITES,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=users, val_data=users),
        PyTorchModel(
            module,
            torch.optim.SGD,
            torch.optim.SGD(module.parameters(), lr=1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=workload.RATE,
            local_batch_size=workload.BATCH,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=workload.ROWS),
        callbacks=[Rounds()],
    )
    harness.told(rounds, workload.loss_of(module.state_dict()), "pfl")


if __name__ == "__main__":
    main()
