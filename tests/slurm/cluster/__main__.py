# SPDX-License-Identifier: Apache-2.0
"""The cluster by hand: ``python3 -m tests.slurm.cluster VERB``, as root on Debian, from the repository's root.

up                    install what is missing, build the cluster, show its nodes
exec COMMAND...       run a command on the login node: srun, sbatch, squeue, a shell
node NAME COMMAND...  run a command on a compute node
kill-node NAME        power a node off; start-node NAME powers it on again
status                what runs
pids NAME             the processes of a host, by their pids on this machine
down                  stop everything and remove the state folder
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.namespaces.commands import InsideProcess
from tests.namespaces.errors import ClusterError
from tests.namespaces.processes import command_line

from .cluster import Cluster
from .settings import LOGIN, ClusterSettings

DEFAULT_STATE = Path("/tmp/dynmpi-cluster")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.slurm.cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE, help="the cluster's folder (default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    up = verbs.add_parser("up", help="build the cluster")
    up.add_argument("--nodes", type=int, default=ClusterSettings.nodes)
    up.add_argument("--cpus-per-node", type=int, default=ClusterSettings.cpus_per_node)
    up.add_argument("--gpus-per-node", type=int, default=ClusterSettings.gpus_per_node)
    run = verbs.add_parser("exec", help="run a command on the login node")
    run.add_argument("command", nargs=argparse.REMAINDER)
    node = verbs.add_parser("node", help="run a command on a compute node")
    node.add_argument("name")
    node.add_argument("command", nargs=argparse.REMAINDER)
    for verb, text in (
        ("kill-node", "power a node off"),
        ("start-node", "power it on"),
        ("pids", "a host's processes"),
    ):
        verbs.add_parser(verb, help=text).add_argument("name")
    verbs.add_parser("status", help="what runs")
    verbs.add_parser("down", help="stop everything")
    return parser.parse_args(argv)


def foreground(process: InsideProcess) -> int:
    """Wait for a command that has our terminal; Ctrl-C is for it, not for us."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def execute(arguments: argparse.Namespace) -> int:
    state: Path = arguments.state.absolute()
    if arguments.verb == "up":
        cluster = Cluster(ClusterSettings(state, arguments.nodes, arguments.cpus_per_node, arguments.gpus_per_node))
        cluster.up()
        return show_status(cluster)
    cluster = Cluster.existing(state)
    if arguments.verb in ("exec", "node"):
        host = arguments.name if arguments.verb == "node" else LOGIN
        if not arguments.command:
            raise ClusterError("no command given")
        code = foreground(
            cluster.popen(arguments.command, host=host, cwd=Path.cwd(), stdin=None, stdout=None, stderr=None)
        )
        return code if code >= 0 else 128 - code
    if arguments.verb == "kill-node":
        cluster.kill_node(arguments.name)
    elif arguments.verb == "start-node":
        cluster.start_node(arguments.name)
    elif arguments.verb == "pids":
        for pid in cluster.pids(arguments.name):
            print(pid, *command_line(pid))
    elif arguments.verb == "down":
        cluster.down()
    else:
        return show_status(cluster)
    return 0


def show_status(cluster: Cluster) -> int:
    """Print hosts and nodes; 0 if every host runs."""
    running = [host for host in cluster.settings.addresses if cluster.find_init_pid(host)]
    for host in cluster.settings.addresses:
        print(f"{host}: {'running' if host in running else 'off'}")
    if cluster.is_up():
        print(cluster.run(["sinfo", "--Node", "--format=%N %T %c %m %G %E"]).stdout, end="")
    return 0 if len(running) == len(cluster.settings.addresses) else 1


def main() -> int:
    try:
        return execute(parse(sys.argv[1:]))
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
