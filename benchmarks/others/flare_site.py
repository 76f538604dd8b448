"""The training script that flare.py's hospitals run."""

from __future__ import annotations

import nvflare.client as flare
import torch

from others import workload


def main() -> None:
    flare.init()
    number = int(flare.get_site_name().removeprefix("site-")) - 1
    model = workload.Mlp()
    while flare.is_running():
        told = flare.receive()
        if told is None:
            break
        model.load_state_dict({n: torch.as_tensor(v) for n, v in told.params.items()})
        workload.train(model, number)
        flare.send(
            flare.FLModel(
                params=model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": workload.ROWS}
            )
        )


if __name__ == "__main__":
    main()
