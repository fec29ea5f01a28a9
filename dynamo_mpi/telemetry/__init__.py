# SPDX-License-Identifier: Apache-2.0
"""Health answers, metrics, progress, the start-up timeline, notifications."""
