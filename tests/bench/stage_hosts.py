# SPDX-License-Identifier: Apache-2.0
"""Hosts with a slow shared file system between them, for the bench and the tests of staging."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.bench.slow_share import SlowShare
from tests.conftest import ROOT
from tests.hosts.hosts import Hosts
from tests.hosts.launchers import Launcher
from tests.hosts.settings import NETWORKS
from tests.namespaces.commands import InsideProcess

MOUNT = "/mnt/share"
NODE_FOLDER = "/dev/shm/stage"
NETWORK = f"{NETWORKS[1]}.0/24"


class StageHosts:
    """Some hosts, each with its own mount of one slow folder, and a shaped network between them.

    Args:
        count: of hosts.
        launcher: starts ranks on them.
        link: the rate of each link, in bytes a second.
    """

    def __init__(self, count: int, launcher: Launcher, link: float) -> None:
        self._base = Path(tempfile.mkdtemp(prefix="dynmpi-stage-"))
        self._launcher = launcher
        self.hosts = Hosts(count, [self._base], second_rate=f"{link * 8 / 1e6:.0f}mbit")
        self.model = self._base / "model"
        self.share = SlowShare(self.model)
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> StageHosts:
        self.hosts.start()
        self._listener.bind(str(self._base / "share.sock"))
        self._listener.listen()
        self.share.serve(self._listener)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hosts.stop()
        self._listener.close()
        shutil.rmtree(self._base, ignore_errors=True)

    def make_model(self, sizes: Sequence[int]) -> int:
        """Make a model of files of these sizes beside its small ones; return its size."""
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (self.model / "tokenizer.json").write_text("{}" * 5000)
        block = os.urandom(1 << 20)
        for number, size in enumerate(sizes, 1):
            with (self.model / f"model-{number:05}-of-{len(sizes):05}.safetensors").open("wb") as file:
                # no two blocks alike, and quick to make
                for offset in range(0, size, len(block)):
                    file.write(
                        (offset.to_bytes(8, "big") + number.to_bytes(8, "big") + block)[
                            : min(len(block), size - offset)
                        ]
                    )
        return sum(path.stat().st_size for path in self.model.iterdir())

    def mount(
        self, rate: float = 0, mount_rate: float = 0, open_seconds: float = 0, *, hosts: Sequence[str] = ()
    ) -> None:
        """Mount the share anew, with cold caches and an empty folder for copies on each host."""
        self.share.bucket.rate, self.share.mount_rate, self.share.open_seconds = rate, mount_rate, open_seconds
        socket_path = str(self._base / "share.sock")
        for host in hosts or self.hosts.names:
            self.run(host, f"umount -l {MOUNT} 2>/dev/null; rm -rf {NODE_FOLDER}; mkdir -p {NODE_FOLDER}")
            self.run(host, f"{sys.executable} -m tests.bench.slow_share {socket_path} {MOUNT}")
        self.share.reset()

    def run(self, host: str, line: str, seconds: float = 600.0) -> str:
        """Run a shell line on a host, and return what it prints."""
        done = self.hosts.run(host, ["sh", "-c", line], {"PYTHONPATH": str(ROOT)}, seconds)
        if done.returncode:
            raise RuntimeError(f"{host}: {line}: {done.stderr}")
        return done.stdout

    def start_ranks(
        self,
        words: Sequence[str],
        ranks_per_host: int = 1,
        hosts: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> InsideProcess:
        """Start ``tests.bench.stage_ranks`` under mpirun on all hosts, or some."""
        names = tuple(hosts) or self.hosts.names
        own = {**self._launcher.rank_environment(), "PYTHONPATH": str(ROOT), **(environment or {})}
        argv = [sys.executable, "-m", "tests.bench.stage_ranks", *words]
        command = self._launcher.command(self.hosts, names, ranks_per_host, list(own), argv)
        import subprocess

        return self.hosts.popen(
            names[0], command, {**self._launcher.environment(self.hosts), **own}, stdin=subprocess.PIPE
        )

    def stage(
        self, *words: str, ranks_per_host: int = 1, hosts: Sequence[str] = (), seconds: float = 600.0
    ) -> dict[str, Any]:
        """Stage the model on hosts, and return what rank 0 prints."""
        with self.start_ranks([MOUNT, NODE_FOLDER, "--network", NETWORK, *words], ranks_per_host, hosts) as process:
            stdout, stderr = process.communicate(timeout=seconds)
        lines = [line for line in stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise RuntimeError(f"ranks ended with code {process.returncode}: {stdout}\n{stderr}")
        result: dict[str, Any] = json.loads(lines[-1])
        return result
