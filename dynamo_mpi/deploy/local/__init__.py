# SPDX-License-Identifier: Apache-2.0
"""``dynamo-mpi local``: etcd, NATS, the Dynamo frontend and the workers on this machine.

All processes listen on loopback, use one private folder, and end with the command.
"""
