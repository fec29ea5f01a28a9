# SPDX-License-Identifier: Apache-2.0
"""etcd and NATS: worker records, failure records, lifecycle events, leases and their revocation."""
