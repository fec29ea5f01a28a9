# SPDX-License-Identifier: Apache-2.0
"""Pages of ``docs/`` that are written from the code: ``make docs`` writes them, a test fails when one is stale."""
