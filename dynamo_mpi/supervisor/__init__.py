# SPDX-License-Identifier: Apache-2.0
"""Supervision of all ranks: heartbeats, node agents, failure handling, signals, fault injection."""
