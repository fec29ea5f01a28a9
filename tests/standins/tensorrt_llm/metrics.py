# SPDX-License-Identifier: Apache-2.0
"""Request metrics: taken and dropped."""

from __future__ import annotations

from typing import Any


class MetricsCollector:
    """Collects nothing."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels

    def log_request_metrics_dict(self, metrics_dict: dict[str, Any]) -> None:
        """Drop them."""

    def log_iteration_stats(self, iteration_stats: dict[str, Any]) -> None:
        """Drop them."""
