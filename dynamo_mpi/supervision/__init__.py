# SPDX-License-Identifier: Apache-2.0
"""Watching over the life of a world: phases, and later deadlines, liveness and failure reports."""
