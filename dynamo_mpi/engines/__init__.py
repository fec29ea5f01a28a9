# SPDX-License-Identifier: Apache-2.0
"""Engines: what loads the weights on all ranks and makes tokens. The phases don't know which one runs."""
