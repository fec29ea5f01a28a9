# SPDX-License-Identifier: Apache-2.0
"""What starts and ends whole deployments: services, Slurm steps, mpirun, this machine alone, Kubernetes."""
