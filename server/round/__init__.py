"""The coordinator's side of a run, a pure state machine; `machine.CoordinatorRound` is its door."""
