# SPDX-License-Identifier: Apache-2.0
"""Checks that need the live world: what each rank sees, gathered once and judged once."""
