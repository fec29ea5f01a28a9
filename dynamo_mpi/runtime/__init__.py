# SPDX-License-Identifier: Apache-2.0
"""The lifecycle of a rank: rank 0, the other ranks, the engine runners and the hooks."""
