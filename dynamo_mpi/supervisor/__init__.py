# SPDX-License-Identifier: Apache-2.0
"""The watch over all ranks: heartbeats, the node agent, failures, signals, fault injection."""
