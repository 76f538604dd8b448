# ruff: noqa: INP001 - a script, not a package
"""Run inside an installed environment: is this role alone here, and is it what was released?

    /opt/wardround/bin/python -I separation.py client

Asks the import system, not the disk: what it does not find cannot run. The image builds end
with it, and check_roles.py runs it in fresh environments.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from typing import Final

FORBIDDEN: Final = {
    "client": ("server",),
    "server": ("client", "torch", "opacus", "transformers", "peft", "pyarrow", "tokenizers"),
}
NEEDED: Final = {
    "client": ("common.cli", "client.operate_cli", "client.flower", "torch", "opacus", "peft"),
    "server": ("common.cli", "server.operate_cli", "server.flower", "grpc_health.v1.health"),
}
OTHER: Final = {"client": "server", "server": "client"}


def faults(role: str, *, without: tuple[str, ...] = ()) -> Iterator[str]:
    """Every reason why this environment is not the role's, one line each.

    Args:
        role: client or server.
        without: needed modules that the caller knows to be absent.
    """
    for name in FORBIDDEN[role]:
        if importlib.util.find_spec(name) is not None:
            yield f"{name} can be imported"
    for name in NEEDED[role]:
        if name not in without and not _imports(name):
            yield f"{name} cannot be imported"
    yield from _integrity(role)
    yield from _verbs(role)


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def _integrity(role: str) -> Iterator[str]:
    from common.errors import WardroundError
    from common.integrity import verify

    try:
        found = verify(("common", role))
    except WardroundError as error:
        yield f"integrity: {error.message}"
        return
    if found.status != "verified" or found.files == 0:
        yield f"integrity: {found.status}, {found.files} files"


def _verbs(role: str) -> Iterator[str]:
    from common.cli import HOMES, commands, main

    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        status = main(["--help"])
    if status != 0:
        yield f"wardround --help ends with {status}"
    there = set(commands())
    for module, verbs in HOMES.items():
        home = module.partition(".")[0]
        for verb in verbs:
            if home == OTHER[role] and verb in there:
                yield f"the verb `{verb}` is here"
            if home != OTHER[role] and verb not in there:
                yield f"the verb `{verb}` is not here"
            listed = f"\n  wardround {verb} " in told.getvalue()
            if listed != (verb in there):
                yield f"--help is wrong about the verb `{verb}`"


def main(arguments: list[str]) -> int:
    """The command line: the role, then needed modules that are known to be absent."""
    if not arguments or arguments[0] not in FORBIDDEN:
        sys.stderr.write("usage: separation.py client|server\n")
        return 2
    role = arguments[0]
    found = list(faults(role, without=tuple(arguments[1:])))
    sys.stdout.write(json.dumps({"role": role, "faults": found}) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
