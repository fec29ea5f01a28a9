# SPDX-License-Identifier: Apache-2.0
"""The available nodes, those of a Slurm allocation or of a hostfile, and which worker gets which of them."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dynamo_mpi.common.config_reader import read_small_text
from dynamo_mpi.common.display import sanitize
from dynamo_mpi.common.errors import ConfigFileError, UsageError
from dynamo_mpi.common.process import host_name
from dynamo_mpi.deploy.hostlist import expand
from dynamo_mpi.layout.format import counted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from dynamo_mpi.deploy.settings import LaunchSettings

_SCONTROL_SECONDS = 30.0
STAND_IN_JOB = "JOB"
# nothing that mpirun or ssh would take for an option
_HOST = re.compile(r"(?:\w[\w.-]*@)?[\w\[][\w.:%\[\]-]*", re.ASCII)


@dataclass(frozen=True)
class Nodes:
    """The nodes of a deployment.

    Args:
        names: their names, in the order in which workers get them.
        head: the node of the services; one of the names, or this machine.
        job_id: Slurm's job id; empty under mpirun.
        chosen: whether ``--nodes`` lists them.
    """

    names: tuple[str, ...]
    head: str
    job_id: str = ""
    chosen: bool = False

    def with_head_outside(self, excluded: Collection[str]) -> Nodes:
        """Return it with another head node, if that one is left out and there is another one."""
        free = [name for name in self.names if name not in excluded]
        return replace(self, head=free[0]) if self.head in excluded and free else self


def allocated(environ: Mapping[str, str], wanted: int, gpus_per_node: int, *, no_kill: bool = False) -> Nodes:
    """Return the nodes of the Slurm allocation in which this process runs.

    Args:
        environ: the environment of a batch script, of ``salloc``'s shell, or of a shell of one of its steps.
        wanted: number of nodes that the deployment needs, for the error's fix.
        gpus_per_node: GPUs of each node, for the same.
        no_kill: whether the job must outlive a lost node, for the same.

    Raises:
        UsageError: there is no allocation, or Slurm does not list its nodes.
    """
    job_id = environ.get("SLURM_JOB_ID", "")
    if not job_id:
        more = "".join(
            f" --{name}={environ[name.upper()]}" for name in ("partition", "account") if environ.get(name.upper())
        )
        more += " --no-kill" if no_kill else ""
        raise UsageError(
            "this is no Slurm allocation: SLURM_JOB_ID isn't set",
            expected=f"a shell or a batch script with {counted(wanted, 'node')}",
            fix=f"salloc --nodes={wanted} --exclusive --gpus-per-node={gpus_per_node}{more}, and this command in its "
            "shell; or sbatch scripts/sbatch_disaggregated.sh",
        )
    written = environ.get("SLURM_JOB_NODELIST", "")
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", written],
            capture_output=True,
            text=True,
            timeout=_SCONTROL_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise UsageError(
            "scontrol isn't on PATH",
            expected="Slurm's commands, on the host",
            fix="run this on the host, not in a container, and add Slurm's bin folder to PATH",
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise UsageError(
            f"scontrol show hostnames failed, so the nodes of job {job_id} are unknown: {said}",
            expected=f"the nodes of SLURM_JOB_NODELIST={written}",
            fix="try it in this shell, and scontrol ping; if the list is cut or wrong, start a new shell in the allocation",
        ) from None
    names = tuple(done.stdout.split())
    if not names:
        raise UsageError(
            f"job {job_id} has no nodes: SLURM_JOB_NODELIST is {written!r}",
            expected="the nodes of the allocation",
            fix="run this in the shell or the batch script of the allocation, with its variables",
        )
    return Nodes(names, _head(environ, names), job_id)


def choose(nodes: Nodes, environ: Mapping[str, str], written: str) -> Nodes:
    """Return the nodes that ``--nodes`` lists.

    Args:
        nodes: those of the allocation, or of a dry run.
        environ: the environment.
        written: the list, as Slurm writes it.

    Raises:
        UsageError: it is no list of hosts, or has some that the job doesn't have.
    """
    names = expand(written, "--nodes")
    foreign = [name for name in names if name not in nodes.names]
    if foreign and nodes.job_id != STAND_IN_JOB:
        raise UsageError(
            f"--nodes is {written!r}, and job {nodes.job_id} does not have {', '.join(foreign)}",
            expected=f"a number of nodes, or some of {', '.join(nodes.names)}",
            fix="correct --nodes, or leave it out to take all nodes of the job",
        )
    return Nodes(names, _head(environ, names), nodes.job_id, chosen=True)


def of_dry_run(environ: Mapping[str, str], wanted: int) -> Nodes:
    """Return the nodes for a dry run, without Slurm's commands: those that ``SLURM_JOB_NODELIST`` has, or made-up ones.

    Args:
        environ: the environment, of an allocation or of any shell.
        wanted: number of nodes that the deployment needs.

    Raises:
        UsageError: ``SLURM_JOB_NODELIST`` is no list of hosts.
    """
    written, job_id = environ.get("SLURM_JOB_NODELIST", ""), environ.get("SLURM_JOB_ID", "") or STAND_IN_JOB
    names = (
        expand(written, "SLURM_JOB_NODELIST") if written else tuple(f"node{number}" for number in range(1, wanted + 1))
    )
    return Nodes(names, _head(environ, names), job_id)


def _head(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    here = environ.get("SLURMD_NODENAME", "")
    return here if here in names else names[0]


def is_this_host(name: str) -> bool:
    """Return whether a hostfile's entry is this host: its name, or a loopback name."""
    host = name.rpartition("@")[2]
    return host in ("localhost", "127.0.0.1", "::1", os.uname().nodename) or host.partition(".")[0] == host_name()


def of_hostfile(path: Path, here: str) -> Nodes:
    """Return the hosts of mpirun's hostfile: one per line, each once; ``slots=N`` and comments are ignored.

    Args:
        path: the file.
        here: this host, on which the services run.

    Raises:
        ConfigFileError: the file can't be read, or names no host, or something that is none.
    """
    try:
        lines = read_small_text(path).splitlines()
    except OSError as error:
        raise ConfigFileError(
            f"the hostfile {path} can't be read: {error.strerror}",
            expected="one host on a line",
            fix="correct --hostfile, or the file's permissions",
        ) from None
    words = (line.partition("#")[0].split() for line in lines)
    names = tuple(dict.fromkeys(first for first, *_ in filter(None, words)))
    if wrong := [name for name in names if not _HOST.fullmatch(name)]:
        raise ConfigFileError(
            f"the hostfile {path} has {sanitize(repr(wrong[0]), 80)} for a host",
            expected="one host on a line: a name or an address, also USER@HOST",
            fix="correct the line",
        )
    if not names:
        raise ConfigFileError(f"the hostfile {path} names no host", expected="one host on a line", fix="add the hosts")
    return Nodes(names, here)


@dataclass(frozen=True)
class Worker:
    """One worker of a deployment.

    Args:
        name: unique, such as ``prefill-0``.
        role: ``agg``, ``prefill`` or ``decode``.
        engine_config: its path for the ranks.
        nodes: its nodes.
        ranks_per_node: one for each GPU.
    """

    name: str
    role: str
    engine_config: str
    nodes: tuple[str, ...]
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        return len(self.nodes) * self.ranks_per_node

    def moved(self, moves: Iterable[tuple[str, str]], order: Sequence[str]) -> Worker:
        """Return it with other nodes in the places of some.

        Args:
            moves: pairs of a node and the one that takes its place.
            order: all nodes of the deployment, in Slurm's order, in which it numbers a step's nodes and so its ranks.
        """
        other = dict(moves)
        return replace(self, nodes=tuple(sorted((other.get(node, node) for node in self.nodes), key=order.index)))


class Placement(NamedTuple):
    """Where the parts of a deployment begin.

    Args:
        workers: the workers and their nodes.
        spares: nodes that no worker has.
        head: the node of the services.
        order: all nodes, in Slurm's order, or the hostfile's.
    """

    workers: tuple[Worker, ...]
    spares: tuple[str, ...] = ()
    head: str = ""
    order: tuple[str, ...] = ()


def nodes_wanted(settings: LaunchSettings) -> int:
    """Return the number of nodes for all workers, the head node is one of them, and of the spares."""
    return settings.spare_nodes + sum(nodes * workers for _, nodes, workers in map(settings.of, settings.worker_roles))


def assign(settings: LaunchSettings, nodes: Nodes, excluded: Collection[str] = ()) -> Placement:
    """Assign nodes to each worker: neighbours in Slurm's order, prefill first; spares are the last ones, and never the head node.

    Args:
        settings: the deployment's settings.
        nodes: the available nodes.
        excluded: nodes that an earlier start of the job has left out: no worker gets them, and they count as missing spares first.

    Raises:
        UsageError: there are too few nodes.
    """
    names = tuple(name for name in nodes.names if name not in excluded)
    wanted = nodes_wanted(settings)
    if wanted - min(settings.spare_nodes, len(nodes.names) - len(names)) > len(names):
        listed = ", ".join(
            f"{workers} {role} worker{'s' if workers > 1 else ''} x {count} node{'s' if count > 1 else ''}"
            for role in settings.worker_roles
            for _, count, workers in [settings.of(role)]
        )
        if settings.spare_nodes:
            listed += f", {counted(settings.spare_nodes, 'spare node')}"
        where = f"job {nodes.job_id}" if nodes.job_id else f"the hostfile {settings.hostfile}"
        where = "the list of nodes" if nodes.job_id == STAND_IN_JOB else where
        where, more = (
            ("--nodes", "more nodes in --nodes")
            if nodes.chosen
            else (where, "a larger allocation" if nodes.job_id else "more hosts in the file")
        )
        without = f", without the excluded {', '.join(excluded)}" if len(names) < len(nodes.names) else ""
        fewer = ", or fewer spare nodes: NUM_SPARE_NODES" if settings.spare_nodes else ""
        raise UsageError(
            f"{listed}: that takes {counted(wanted, 'node')}, and {where} has {len(names)} ({', '.join(names)}){without}",
            expected=f"at least {counted(wanted, 'node')}",
            fix=f"{more}, or fewer nodes or workers: NUM_PREFILL_NODES, NUM_DECODE_NODES, NUM_NODES and their _WORKERS{fewer}",
        )
    # all that is left over, where the user gave more nodes, stays as it was: unused
    last = [name for name in names[:wanted] if name != nodes.head]
    spares = tuple(last[len(last) - max(0, settings.spare_nodes - max(0, wanted - len(names))) :])
    free = iter(name for name in names if name not in spares)
    parts = []
    for role in settings.worker_roles:
        config, count, workers = settings.of(role)
        assert config is not None  # noqa: S101 - read_settings has seen to it
        for number in range(workers):
            own = tuple(next(free) for _ in range(count))
            parts.append(Worker(f"{role}-{number}", role, config, own, settings.gpus_per_node))
    return Placement(tuple(parts), spares, nodes.head, nodes.names)
