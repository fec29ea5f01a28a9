# SPDX-License-Identifier: Apache-2.0
"""A rank's life: rank 0, the others, the engine's runners, and the hooks that follow them."""
