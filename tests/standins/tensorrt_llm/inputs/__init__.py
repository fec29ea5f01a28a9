# SPDX-License-Identifier: Apache-2.0
"""Multimodal inputs: there are none."""
