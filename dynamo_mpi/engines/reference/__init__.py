# SPDX-License-Identifier: Apache-2.0
"""The reference engine: a tensor-parallel llama in numpy over MPI, which runs a real model on CPUs.

Importing this package imports neither numpy nor MPI, so that a worker can set ``blas_threads`` first.
"""
