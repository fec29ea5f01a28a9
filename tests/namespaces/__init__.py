# SPDX-License-Identifier: Apache-2.0
"""Hosts on one machine, each a process tree in namespaces of its own: what the Slurm cluster and the hosts without Slurm have in common.

- ``anchor``: the one process that holds them all, and how commands enter a host;
- ``commands``: commands on a host, their signals and time limits;
- ``network``: what the hosts' own PID 1 does to become a host, and to build the network between them;
- ``processes``: pids that cannot be mistaken for another process.
"""
