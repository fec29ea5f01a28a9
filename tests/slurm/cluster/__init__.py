# SPDX-License-Identifier: Apache-2.0
"""A real Slurm cluster on one machine: munge, slurmctld and N slurmd, as a test fixture or by hand.

The login node is a process tree in its own network, mount, UTS, IPC and PID namespaces; each compute node is nested in it with
namespaces of its own, a private /dev/shm and a cable to the login node's bridge. So one SIGKILL to the login node's PID 1 ends
every process, network and mount of the cluster at once, and two clusters share nothing but the file system.

By hand: ``python3 -m tests.slurm.cluster --help``. From tests: the fixture ``slurm``. Modules, from the outside in:

- ``cluster``: up, down, entering a host, switching nodes off and on;
- ``packages``: Debian packages, installed on demand;
- ``config``: slurm.conf and its companions, as pure text;
- ``inside``: what runs as PID 1 of the login node and of each compute node;
- ``pyxis_standin.c``: accepts the options of NVIDIA's Pyxis and does the bind mounts.

What hosts in namespaces have in common with those without Slurm (``tests.hosts``) lies in ``tests.namespaces``.
"""
