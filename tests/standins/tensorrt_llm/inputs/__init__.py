# SPDX-License-Identifier: Apache-2.0
"""Prompts, and multimodal inputs, of which images are taken to be refused."""
