# SPDX-License-Identifier: Apache-2.0
"""What a job's workers need beside them, on its head node: etcd, NATS and the Dynamo frontend, of this job alone.

``python -m dynamo_mpi.head_node --run-dir DIR`` starts them, says in ``DIR/services.json`` where they are, and stops them with the job.
"""
