# SPDX-License-Identifier: Apache-2.0
"""What operators see of a worker while it runs and after it: so far, the timeline of its start."""
