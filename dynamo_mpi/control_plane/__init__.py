# SPDX-License-Identifier: Apache-2.0
"""etcd, NATS and Dynamo, seen from rank 0."""
