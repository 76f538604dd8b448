"""The part of flare.py that FLARE's server process loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.widget import Widget

from others import harness


class Rounds(Widget):  # type: ignore[misc]  # untyped
    """Notes every round when its model is saved, and keeps the last model."""

    def __init__(self, rounds: int, final: str) -> None:
        super().__init__()
        self.rounds = rounds
        self.final = final
        self._number = 0
        self._model: dict[str, Any] = {}

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type == AppEventType.AFTER_AGGREGATION:
            self._model = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).params
        elif event_type == AppEventType.AFTER_LEARNABLE_PERSIST:
            self._number += 1
            harness.round_done(self._number, self.rounds)
            if self._number == self.rounds:
                model = {name: array.tolist() for name, array in self._model.items()}
                Path(self.final).write_text(json.dumps(model))
