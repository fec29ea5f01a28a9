# SPDX-License-Identifier: Apache-2.0
"""Runs a world over several Kubernetes pods by Open MPI's mpirun, without ssh, kubectl or rights at the API server.

    leader pod     python -m dynamo_mpi.pods lead --pods 2 --ranks-per-pod 8 -- python3 -m dynamo_mpi.worker …
    other pods     python -m dynamo_mpi.pods join --leader LEADER

The other pods connect to the leader. When all have joined, it starts mpirun; its launch agent (`agent`, instead of ssh) sends the arguments
of each daemon (``orted``, ``prted``) to its pod. Nothing listens in the other pods.
"""
