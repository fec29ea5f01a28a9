# SPDX-License-Identifier: Apache-2.0
"""Diagnoses a machine: a module for each section, with small readers of facts and pure functions that evaluate them.

Only the standard library is required. If a section needs a missing package, it reports that.
"""
