# SPDX-License-Identifier: Apache-2.0
"""What operators ask of a deployment: its status, to wait for it, to stop it, and what is wrong with a machine."""
