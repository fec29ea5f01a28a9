# SPDX-License-Identifier: Apache-2.0
"""How the property tests run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# by default an example that takes 200 ms fails its test, which on a busy machine any may
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
