# SPDX-License-Identifier: Apache-2.0
"""What the golden files hold: the output of `--dry-run` for some deployments. `python -m tests.scripts.dry_runs` writes them anew."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
STANDINS = HERE / "standins"
LLAMA = {
    "MODEL_PATH": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "SERVED_MODEL_NAME": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "PREFILL_ENGINE_CONFIG": "/mnt/engine_configs/multimodal/llama4/prefill.yaml",
    "DECODE_ENGINE_CONFIG": "/mnt/engine_configs/multimodal/llama4/decode.yaml",
    "NUM_PREFILL_NODES": "2",
    "NUM_DECODE_NODES": "2",
}
JOB = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "n[1-4]", "SLURMD_NODENAME": "n1", "SLURM_NTASKS": "16"}


@dataclass(frozen=True)
class Case:
    """One dry run.

    Args:
        name: of its golden file.
        script: of ours.
        words: after it.
        environment: all that it sees beside PATH.
    """

    name: str
    script: str
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


CASES = (
    Case(
        "disaggregated_llama4_in_a_job",
        "srun_disaggregated.sh",
        ("--", "--modality", "multimodal"),
        {
            **LLAMA,
            **JOB,
            "IMAGE": "/images/dynamo trtllm.sqsh",
            "MOUNTS": "/lustre:/lustre,/checkout:/mnt",
            "STAGE_DIR": "/local/scratch",
            "CACHE_DIR": "/shared/caches",
            "TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        },
    ),
    Case("disaggregated_defaults", "srun_disaggregated.sh", (), {"IMAGE": "nvcr.io#nvidia/dynamo", "MODEL_PATH": "/m"}),
    Case(
        "disaggregated_bare_metal_more_workers",
        "srun_disaggregated.sh",
        ("--prefill-nodes", "1", "--decode-nodes", "1", "--skip-check"),
        {
            "MODEL_PATH": "/models/M",
            "NUM_PREFILL_WORKERS": "2",
            "NUM_DECODE_WORKERS": "2",
            "DYN_MPI_PYTHON": "/opt/venv/bin/python",
            "SRUN_ARGS": "--cpus-per-task=9 --comment='two words'",
            **JOB,
        },
    ),
    Case(
        "disaggregated_spare_node",
        "srun_disaggregated.sh",
        ("--prefill-nodes", "1", "--decode-nodes", "2", "--skip-check"),
        {"MODEL_PATH": "/models/M", "NUM_SPARE_NODES": "1", "DYN_MPI_PYTHON": "/opt/venv/bin/python", **JOB},
    ),
    Case("aggregated_defaults", "srun_aggregated.sh", (), {"IMAGE": "nvcr.io#nvidia/dynamo", "MODEL_PATH": "/m"}),
    Case(
        "mpirun",
        "srun_disaggregated.sh",
        ("--hostfile", str(HERE / "hostfile"), "--prefill-nodes", "1", "--decode-nodes", "2"),
        {"MODEL_PATH": "/models/M", "DYN_MPI_PYTHON": "/opt/venv/bin/python", "DYN_LOG": "info"},
    ),
    Case(
        "sbatch",
        "sbatch_disaggregated.sh",
        ("--time=04:00:00", "--", "--ready", "a b"),
        {**LLAMA, "NUM_SPARE_NODES": "1", "PARTITION": "batch", "ACCOUNT": "it's mine"},
    ),
)


def dry_run(case: Case) -> str:
    """Return the output, with the checkout's path as ``/checkout``."""
    environment = {"PATH": f"{STANDINS}:{os.environ['PATH']}", "PYTHON": sys.executable, **case.environment}
    environment |= {} if case.script.startswith("sbatch") else {"DYN_MPI_RUN_DIR": "/shared/run"}
    words = [str(ROOT / "scripts" / case.script), "--dry-run", *case.words]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.replace(str(ROOT), "/checkout")


def main() -> None:
    """Write all golden files."""
    for case in CASES:
        (GOLDEN / f"{case.name}.txt").write_text(dry_run(case))


if __name__ == "__main__":
    main()
