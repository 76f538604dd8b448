"""Stock Flower on loopback: one SuperLink, one SuperNode a hospital, `flwr run` of the stub app."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
CODE = HERE.parents[1]
APP = CODE / "configs" / "flower-app"
PROGRAMS = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stock:
    """The processes of stock Flower; each prints into a file of its own below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home = root / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
        self.environment = {
            **kept,
            "PATH": f"{PROGRAMS}{os.pathsep}{kept.get('PATH', '')}",
            "PYTHONPATH": str(CODE),  # "installed": what a checkout stands for
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def superlink(self) -> None:
        words = ["--insecure", "--port", str(self.port)]
        self._start(
            "superlink", "flower-superlink", *words, "--disable-runtime-dependency-installation"
        )
        self.wait(self._listening, "the SuperLink does not listen", 60)

    def supernode(self, name: str, config: Mapping[str, str]) -> None:
        told = " ".join(f'{key}="{value}"' for key, value in config.items())
        words = ["--insecure", "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port())]
        self._start(name, "flower-supernode", *words, "--node-config", told)

    def run(self, run_config: Mapping[str, str]) -> str:
        """What `flwr run` says."""
        told = " ".join(f'{key}="{value}"' for key, value in run_config.items())
        done = subprocess.run(
            [PROGRAMS / "flwr", "run", APP, "loopback", "--run-config", told],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def wait(self, over: Callable[[], Any], what: str, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while not (found := over()):
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended\n{self.output(name)}"
            assert time.monotonic() < end, f"{what}\n{self.outputs()}"
            time.sleep(0.2)
        return found

    def output(self, name: str) -> str:
        return (self.root / f"{name}.out").read_text(errors="replace")[-4000:]

    def started(self, name: str) -> int:
        """How many processes a SuperNode started for messages."""
        told = (self.root / f"{name}.out").read_text(errors="replace")
        return told.count("Start `flwr-clientapp` process")

    def outputs(self) -> str:
        return "\n".join(f"--- {name}\n{self.output(name)}" for name in self.processes)

    def close(self) -> None:
        """End every process group that was started here."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)

    def _start(self, name: str, program: str, *words: str) -> None:
        with (self.root / f"{name}.out").open("wb") as out:
            self.processes[name] = subprocess.Popen(
                [PROGRAMS / program, *words],
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
