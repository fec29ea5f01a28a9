# SPDX-License-Identifier: Apache-2.0
"""Slurm's configuration files: rendered as pure text, then written with what they name (devices, key, plugin)."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from tests.namespaces.errors import ClusterError

from .entry import IMPORT_ROOT
from .settings import LOGIN, SLURMCTLD_PORT, SLURMD_PORT, ClusterSettings

LIBRARIES = Path("/usr/lib") / f"{platform.machine()}-linux-gnu"
PMIX_LIBRARY = LIBRARIES / "pmix2" / "lib"
PYXIS_SOURCE = Path(__file__).with_name("pyxis_standin.c")
NULL_DEVICE = os.makedev(1, 3)
"""A fake GPU is a second /dev/null: Slurm wants a device file, and leaves count-only GPUs in state 'inval'."""

# Lines whose reason is not plain:
# - SlurmdSpoolDir and TmpFS carry %n, as all nodes share one file system; with one TmpFS the nodes' PMIx servers collide
#   ("task 2 launch failed: Unspecified error").
# - TaskPlugin and ProctrackType do without cgroups, which a container often lacks; the nodes' PID namespaces do their work.
# - MessageTimeout: a node without power is only given up once a message to it has been. At most Slurm's own default, 10.
# - ReturnToService=2: a node that was switched off is idle again as soon as its slurmd registers.
SLURM_CONF = """\
ClusterName=namespaces
SlurmctldHost={login}({login_address})
SlurmctldPort={slurmctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket},cred_expire={requeue_delay}
CredType=cred/munge
StateSaveLocation={state}/slurmctld
SlurmdSpoolDir={state}/spool.%n
TmpFS={state}/tmp.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={node_timeout}
MessageTimeout={message_timeout}
SlurmctldTimeout=15
InactiveLimit=0
MinJobAge=3600
KillWait={kill_wait}
WaitTime=0
UnkillableStepTimeout=20
"""


def render_slurm_conf(settings: ClusterSettings) -> str:
    gpus = f" Gres=gpu:{settings.gpus_per_node}" if settings.gpus_per_node else ""
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={settings.addresses[name]} Port={SLURMD_PORT} "
        f"CPUs={settings.cpus_per_node} RealMemory=4000{gpus} State=UNKNOWN"
        for name in settings.node_names
    ]
    head = SLURM_CONF.format(
        login=LOGIN,
        login_address=settings.addresses[LOGIN],
        slurmctld_port=SLURMCTLD_PORT,
        munge_socket=settings.munge_socket,
        state=settings.state,
        logs=settings.logs,
        plugins=LIBRARIES / "slurm-wlm",
        node_timeout=settings.node_timeout,
        message_timeout=min(settings.node_timeout, 10),
        kill_wait=settings.kill_wait,
        requeue_delay=settings.requeue_delay,
    )
    partition = "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES"
    return head + "\n".join([*(["GresTypes=gpu"] if gpus else []), *nodes, partition]) + "\n"


def render_gres_conf(settings: ClusterSettings) -> str:
    """One line per device and node: no brackets to get wrong where there is only one of either."""
    lines = [f"NodeName={name} Name=gpu File={gpu}" for name in settings.node_names for gpu in settings.gpu_devices]
    return "\n".join(["AutoDetect=off", *lines]) + "\n"


def render_plugstack_conf(settings: ClusterSettings) -> str:
    """Pyxis's stand-in: its images are of this machine, and have this Python and these modules wherever they lie."""
    held = dict.fromkeys((str(IMPORT_ROOT), sys.prefix, sys.base_prefix))
    words = [f"spool={settings.state}/spool.", *(f"image={folder}" for folder in held)]
    return f"required {settings.pyxis_plugin} {' '.join(words)}\n"


def render_hosts(settings: ClusterSettings) -> str:
    lines = [f"{address} {name}" for name, address in settings.addresses.items()]
    return "\n".join(["127.0.0.1 localhost", "::1 localhost ip6-localhost", *lines]) + "\n"


def write_configuration(settings: ClusterSettings) -> None:
    """Fill the state folder with all that the daemons read."""
    for folder in (settings.logs, settings.munge_socket.parent, settings.state / "dev", settings.state / "slurmctld"):
        folder.mkdir(exist_ok=True)
    settings.container_root.mkdir(exist_ok=True)
    settings.temporary.mkdir(exist_ok=True)
    settings.temporary.chmod(0o1777)
    settings.hosts.write_text(render_hosts(settings))
    settings.slurm_conf.write_text(render_slurm_conf(settings))
    # slurmd dies for lack of a mounted /sys/fs/cgroup without this line, though nothing here uses cgroups
    (settings.state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    if settings.gpus_per_node:
        (settings.state / "gres.conf").write_text(render_gres_conf(settings))
    (settings.state / "plugstack.conf").write_text(render_plugstack_conf(settings))
    settings.munge_key.touch(mode=0o600)
    settings.munge_key.write_bytes(secrets.token_bytes(1024))
    for device in settings.gpu_devices:
        os.mknod(device, stat.S_IFCHR | 0o666, NULL_DEVICE)
        device.chmod(0o666)
    build_pyxis_standin(settings)
    complete_pmix_library(settings)


def build_pyxis_standin(settings: ClusterSettings) -> None:
    """Compile the SPANK plugin.

    Raises:
        ClusterError: the compiler refused it.
    """
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Wextra",
        f'-DROOT="{settings.container_root}"',
        "-o",
        str(settings.pyxis_plugin),
        str(PYXIS_SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"cannot build {PYXIS_SOURCE.name}: {done.stderr}")


def complete_pmix_library(settings: ClusterSettings) -> None:
    """Copy PMIx's folder with the name ``libpmix.so`` added, to be mounted over the original inside the cluster.

    Debian's mpi_pmix_v4.so opens that absolute name, which only libpmix-dev ships; without it ``srun --mpi=list`` shows pmix
    although every use of it fails ("can not load PMIx library").
    """
    shutil.copytree(PMIX_LIBRARY, settings.pmix_library, symlinks=True)
    name = settings.pmix_library / "libpmix.so"
    if not name.is_symlink():
        name.symlink_to("libpmix.so.2")
