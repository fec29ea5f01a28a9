# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/exit-codes.md``: what a process ends with, from `ExitCode` and the errors that give it."""

from __future__ import annotations

import inspect

from dynamo_mpi.common import errors
from dynamo_mpi.common.errors import ExitCode
from tools.gen_docs.markdown import WRITTEN, code, member_notes, plain, table

TO_DO = {
    ExitCode.OK: ("nothing", "no one"),
    ExitCode.USAGE: (
        "correct the command line, the variable or the launch that the message names",
        "no one: it would end in the same way",
    ),
    ExitCode.DATA: ("correct the file that the message names", "no one"),
    ExitCode.NO_MODEL: ("make the model, the image or the mount readable on every node, with the same files", "no one"),
    ExitCode.UNAVAILABLE: (
        "look at etcd or NATS: do they run, is the address right, is there a firewall? for a script: at PyPI",
        "`launch --max-restarts`; a batch job isn't requeued",
    ),
    ExitCode.ENGINE: (
        "read the report: it names the rank, its host and the phase",
        "`launch --max-restarts`; no requeue, also of a worker that ended three times in a row for the same temporary cause",
    ),
    ExitCode.TEMPORARY: (
        "start it again",
        "`launch --max-restarts`, and `sbatch_disaggregated.sh`, which requeues its job on this code alone",
    ),
    ExitCode.NOT_AUTHORISED: (
        "correct the credentials, or the user's rights in etcd; take a folder of your own",
        "no one",
    ),
    ExitCode.ILLEGAL_LAYOUT: ("take one of the layouts that the message names; `dynamo-mpi plan` has all", "no one"),
    ExitCode.DEADLINE: (
        "read where every rank stood; a longer `--…-timeout` where the work just takes long",
        "`launch --max-restarts`",
    ),
}
"""What an operator does, and who starts it again."""
_HEAD = f"""# Exit codes

{WRITTEN}
All ranks leave with the code of the first cause, and `launch`, `pods` and the scripts with that of the
worker that ended them. Where the launcher kills the ranks itself its own code comes instead: [faults](../concepts/faults.md) has which,
by fault. What to do, by code and by message: [troubleshooting](../troubleshooting.md).

"""
_TAIL = """
The codes whose cases their names don't tell:

- **65:** an engine config, a settings file or a hostfile that can't be read or makes no sense; engine configs that differ between ranks
  (P2); keys and values that TensorRT-LLM doesn't take (H); a model's `config.json` that is no JSON, or lacks what is needed; a file that is
  no timeline; in `wait` and `status`, a damaged `services.json`.
- **66:** a model folder without config, tokenizer or weights, with damaged or unreadable ones, or that differs between nodes (P3); a GGUF
  file that can't be converted; and from `launch`, an image or the source of a mount that Pyxis can't find on a node.
- **69:** etcd or NATS that doesn't answer, loses the worker's record at once, or has ended: in the services' step of `launch` and in `local`,
  too; no port that is free for them; a worker that Dynamo's runtime could not register; and from `scripts/local.sh` and `scripts/test.sh`,
  packages that could not be installed.

Mistakes (64 to 66, 77, 78) are never retried by `launch`. In a batch script of your own:

    srun --mpi=pmix … python -m dynamo_mpi.worker … || code=$?
    if [ "${code:-0}" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi

`dynamo-mpi check` ends with 0, 78 or 65 for what it judges, 64 for flags, 65 for an engine
config that can't be read, 66 for a model that can't;
with `--trtllm-version all` with the worst of all versions.
"""


def render() -> str:
    """Return the page."""
    notes = member_notes(ExitCode)
    rows = [
        (str(int(member)), code(member.name), notes.get(member.name, "Done."), *TO_DO[member], _errors(member))
        for member in ExitCode
    ]
    rows.append(
        (
            "128 + n",
            "",
            "Ended by signal n, as a shell says it: 137 SIGKILL, 143 SIGTERM.",
            "see who sent it: Slurm, the kernel out of memory, an operator",
            "`launch --max-restarts`, unless the end was requested",
            "",
        )
    )
    return _HEAD + table(("code", "name", "meaning", "what to do", "who starts it again", "errors"), rows) + _TAIL


def _errors(code_of: ExitCode) -> str:
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.DynamoMpiError) and kind is not errors.DynamoMpiError
    ]
    return "; ".join(
        f"`{kind.__name__}`: {plain(kind.__doc__ or '').rstrip('.')}" for kind in kinds if kind.exit_code == code_of
    )
