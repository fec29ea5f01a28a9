# SPDX-License-Identifier: Apache-2.0
"""What a deployment tells of itself to those who look after it."""
