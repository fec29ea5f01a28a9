# SPDX-License-Identifier: Apache-2.0
"""How ranks are launched, where they are, and the MPI world that they form."""
