# SPDX-License-Identifier: Apache-2.0
"""The shell scripts and `dynamo-mpi launch`, without a cluster: what they would run, and how they pass on what they get."""
