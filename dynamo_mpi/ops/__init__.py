# SPDX-License-Identifier: Apache-2.0
"""Commands for operators: status of a deployment, wait, stop, and diagnosis of a machine."""
