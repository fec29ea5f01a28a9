# SPDX-License-Identifier: Apache-2.0
"""Inside NVIDIA's container nothing needs to be installed: a checkout on PYTHONPATH is enough."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.conftest import ROOT, run_command

# what the container has
_THERE = ("mpi4py", "yaml", "_yaml", "dynamo", "dynamo_mpi")
_PROGRAM = f"""
import importlib.abc, importlib.util, sys
class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {_THERE!r}:
            raise ImportError(f"{{name}} is not in the container")
        return None
sys.meta_path.insert(0, Nothing())
import importlib.metadata
def no_metadata(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = no_metadata
import dynamo_mpi.worker, dynamo_mpi.runtime.leader, dynamo_mpi.runtime.follower
import dynamo_mpi.runtime.trtllm_runner, dynamo_mpi.engines.trtllm.session
import dynamo_mpi.engines.trtllm.task, dynamo_mpi.engines.trtllm.readiness_main
import dynamo_mpi.supervisor.supervisor, dynamo_mpi.checks.host_rules
from dynamo_mpi.discovery.record_publisher import RecordPublisher
class Log:
    def warning(self, text): print(text)
# looks at nothing else where the client of etcd is missing
RecordPublisher(Log(), None, print).publish(None, {{}})
print(dynamo_mpi.__file__)
"""


def test_a_checkout_is_enough_for_a_tensorrt_llm_worker(tmp_path: Path) -> None:
    (tmp_path / "dynamo_mpi").symlink_to(ROOT / "dynamo_mpi")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run_command([sys.executable, "-c", _PROGRAM], env=environment, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warning, place = done.stdout.splitlines()
    assert warning.startswith("no worker record, and peers aren't checked: etcd-sdk-python can't be used")
    assert place == str(tmp_path / "dynamo_mpi" / "__init__.py")
