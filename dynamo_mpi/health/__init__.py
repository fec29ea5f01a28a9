# SPDX-License-Identifier: Apache-2.0
"""Answers to probes: each node's first rank tells over HTTP how the world is."""
