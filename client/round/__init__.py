"""The hospital's side of a run as a pure state machine; `machine.SiteRound` is its door."""
