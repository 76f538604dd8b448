"""The records of a simulation, read and judged before anything heavy is loaded.

With `server.simulate`, the only way from here to a hospital's records: whoever mistypes a column
hears of it before keys, ledgers and torch are imported.
"""

from __future__ import annotations

from pathlib import Path

from client.holdings import Holdings, read_holdings
from common.study import Study

__all__ = ["Holdings", "read"]


def read(study: Study, config: Path) -> Holdings:
    """What every hospital of a simulation holds; paths are relative to the folder of `config`.

    Raises DataError naming file and line, ConfigError.
    """
    return read_holdings(study, config)
