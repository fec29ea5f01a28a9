# SPDX-License-Identifier: Apache-2.0
"""What started this process: read from its environment alone, before MPI is touched."""
