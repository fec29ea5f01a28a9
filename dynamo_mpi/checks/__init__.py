# SPDX-License-Identifier: Apache-2.0
"""Checks that run on their own before workers start: `dynamo_mpi.checks.kv`, the way of KV from prefill to decode hosts."""
