# SPDX-License-Identifier: Apache-2.0
"""Asks the hardware, between the verdict and the load: the GPUs, and the way between them. One module for each probe, and one for its rules.

Nothing here is imported where no probe runs.
"""
