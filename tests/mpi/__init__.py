# SPDX-License-Identifier: Apache-2.0
"""Tests that start MPI ranks with a real mpirun."""
