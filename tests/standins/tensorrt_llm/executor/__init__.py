# SPDX-License-Identifier: Apache-2.0
"""Between the process that holds the LLM and the ranks that compute."""
