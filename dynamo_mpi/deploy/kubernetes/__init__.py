# SPDX-License-Identifier: Apache-2.0
"""A world over several pods of Kubernetes by Open MPI's mpirun, without ssh, without kubectl and without rights at the API server.

    leader pod     python -m dynamo_mpi.pods lead --pods 2 --ranks-per-pod 8 -- python3 -m dynamo_mpi.worker …
    other pods     python -m dynamo_mpi.pods join --leader LEADER

The other pods call the leader; once all have, it starts mpirun, whose launch agent (`agent`, in ssh's place) hands the command line of each
pod's daemon (``orted``, ``prted``) to the pod that it is for. Nothing listens in the other pods.
"""
