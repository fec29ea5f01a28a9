# SPDX-License-Identifier: Apache-2.0
"""etcd, NATS and the Dynamo frontend as child processes: command lines, ports, addresses, certificates, folders, ends.

``dynamo-mpi local`` and the head node's services are both built of these.
"""
