# SPDX-License-Identifier: Apache-2.0
"""The services of one job on its head node: etcd, NATS and the Dynamo frontend.

``python -m dynamo_mpi.head_node --run-dir DIR`` starts them, writes their addresses to ``DIR/services.json``, and stops them with the job.
"""
