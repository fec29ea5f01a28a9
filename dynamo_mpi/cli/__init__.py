# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``dynamo-mpi``, one module each."""
