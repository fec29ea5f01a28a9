# SPDX-License-Identifier: Apache-2.0
"""What is checked before the load: rules over ranks, hosts and GPUs, and the hardware itself."""
