# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local``: etcd, NATS, the Dynamo frontend and the workers on this machine.

Everything binds to loopback and lives in one private folder; nothing of it outlives the command.
"""
