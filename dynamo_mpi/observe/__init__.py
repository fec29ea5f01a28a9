# SPDX-License-Identifier: Apache-2.0
"""What an operator sees of a worker."""
