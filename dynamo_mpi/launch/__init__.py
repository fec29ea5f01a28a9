# SPDX-License-Identifier: Apache-2.0
"""Whole deployments: head node services and several workers, as steps of one Slurm job or under mpirun."""
