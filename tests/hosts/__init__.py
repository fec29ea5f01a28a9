# SPDX-License-Identifier: Apache-2.0
"""Two or three hosts on one machine without Slurm, for mpirun and mpiexec, and tests over them.

Each host is a process tree in its own network, mount, UTS, IPC and PID namespaces, with a /dev/shm and a /tmp of its own; bridges join
their networks. One SIGKILL to the anchor's PID 1 ends all of it. Modules, from the outside in:

- ``hosts``: up, down, commands on a host;
- ``launchers``: mpirun and mpiexec over several hosts;
- ``fault_runner``: workers over them that meet a fault;
- ``settings``: names, addresses and files;
- ``inside``: what runs as PID 1 above the hosts and on each; the former also starts what launchers ask for on other hosts;
- ``agent``: what launchers call in ssh's place.
"""
