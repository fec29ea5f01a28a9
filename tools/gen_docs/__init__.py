# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of ``docs/`` that come from the code: ``make docs``; a test fails when one is stale."""
