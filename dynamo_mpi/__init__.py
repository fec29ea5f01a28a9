# SPDX-License-Identifier: Apache-2.0
"""MPI-native bootstrap for multi-node TensorRT-LLM workers of NVIDIA Dynamo on Slurm.

Importing this package starts nothing: no MPI, no runtime, no log handler. The entry points are
``python -m dynamo_mpi.worker`` (one per rank) and ``dynamo-mpi`` (the operator's command).
"""

__version__ = "0.1.0"
