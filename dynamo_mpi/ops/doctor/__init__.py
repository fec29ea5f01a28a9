# SPDX-License-Identifier: Apache-2.0
"""What stands between this machine and a worker: a module for each section, pure judgements over facts that small readers bring.

Nothing here needs more than the standard library. A section that wants more looks for it, and says what is missing.
"""
