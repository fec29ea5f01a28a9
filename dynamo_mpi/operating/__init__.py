# SPDX-License-Identifier: Apache-2.0
"""What operators' commands see of a deployment that runs, and do to it: `status`, `wait`, `down`. Python's own library is enough for them."""
