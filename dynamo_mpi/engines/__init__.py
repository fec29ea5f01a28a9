# SPDX-License-Identifier: Apache-2.0
"""The engines that a worker may run, and their common interface."""
