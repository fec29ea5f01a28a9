# SPDX-License-Identifier: Apache-2.0
"""Metrics in Prometheus' text exposition format 0.0.4. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_KINDS = ("counter", "gauge")
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Sample(NamedTuple):
    """One value of a metric.

    Args:
        value: in base units: seconds, or a number of things.
        labels: distinguish it from the metric's other values.
    """

    value: float
    labels: Mapping[str, str] = {}


class Metric(NamedTuple):
    """One metric with all its values.

    Args:
        name: with its unit, and ``_total`` if it is a counter.
        kind: ``"counter"`` or ``"gauge"``.
        help: one sentence.
        samples: its values.
    """

    name: str
    kind: str
    help: str
    samples: tuple[Sample, ...]


def render(metrics: Iterable[Metric], common: Mapping[str, str] | None = None) -> str:
    """Format metrics. Those without a value are left out.

    Args:
        metrics: each name once.
        common: labels of every sample; a sample's own labels override them.

    Raises:
        ValueError: a name, a label's name or a kind is invalid in Prometheus.
    """
    lines = []
    for metric in metrics:
        if not _NAME.fullmatch(metric.name) or metric.kind not in _KINDS:
            raise ValueError(f"{metric.kind} {metric.name!r} is no metric")
        if metric.samples:
            lines += [
                f"# HELP {metric.name} {_escaped(metric.help)}",
                f"# TYPE {metric.name} {metric.kind}",
                *(_line(metric.name, sample, common or {}) for sample in metric.samples),
            ]
    return "".join(line + "\n" for line in lines)


def _line(name: str, sample: Sample, common: Mapping[str, str]) -> str:
    labels = {**common, **sample.labels}
    if bad := [label for label in labels if not _NAME.fullmatch(label)]:
        raise ValueError(f"{bad[0]!r} is no label")
    # an empty label means the same as none
    text = ",".join(f'{label}="{_quoted(value)}"' for label, value in labels.items() if value)
    return f"{name}{{{text}}} {_number(sample.value)}" if text else f"{name} {_number(sample.value)}"


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
