# SPDX-License-Identifier: Apache-2.0
"""The timeline's colours can be distinguished: from the page, from what is written on them, and from each other by the colour-blind."""

from __future__ import annotations

import itertools

import pytest

from dynamo_mpi.telemetry.startup_summary import ORDER
from dynamo_mpi.telemetry.timeline_page import DARK, LIGHT, Scheme

Triple = tuple[float, float, float]
# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency (2009), severity 1.0
SIGHTS: dict[str, tuple[Triple, Triple, Triple]] = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# CIE76; 2.3 is a difference that can just be seen
LEAST_DIFFERENCE = 15.0
LEAST_CONTRAST = 4.5


def linear(colour: str) -> Triple:
    """Return a colour in linear light (IEC 61966-2-1)."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return lighten(red), lighten(green), lighten(blue)


def lighten(value: float) -> float:
    return float(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio."""
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (linear(one), linear(other)))
    return (high + 0.05) / (low + 0.05)


def seen(colour: str, sight: str) -> Triple:
    """Return a colour in CIELAB as somebody with this sight sees it."""
    light = linear(colour)
    r, g, b = (min(1.0, max(0.0, sum(k * c for k, c in zip(row, light, strict=True)))) for row in SIGHTS[sight])
    # sRGB's primaries and white point D65
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    fx, fy, fz = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def difference(one: str, other: str, sight: str) -> float:
    return float(sum((a - b) ** 2 for a, b in zip(seen(one, sight), seen(other, sight), strict=True)) ** 0.5)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_bars_and_what_is_written_can_be_seen(scheme: Scheme) -> None:
    assert len(scheme.phases) == len(ORDER) + 1
    for colour in scheme.phases:
        assert contrast(colour, scheme.page) >= LEAST_CONTRAST, colour
        assert contrast(colour, scheme.on_bar) >= LEAST_CONTRAST, colour
    for text, ground in itertools.product((scheme.text, scheme.quiet, scheme.bad), (scheme.page, scheme.band)):
        assert contrast(text, ground) >= LEAST_CONTRAST, (text, ground)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_phases_that_follow_each_other_differ_for_every_eye(scheme: Scheme, sight: str) -> None:
    followers = list(itertools.pairwise(ORDER))
    # of a rank other than 0 of the reference engine
    followers += [("preflight", "stage"), ("preflight", "load"), ("hardware_check", "load")]
    followers += [("load", "serve"), ("serve", "exit"), ("warmup", "serve")]
    for one, other in followers:
        colours = scheme.phases[ORDER.index(one)], scheme.phases[ORDER.index(other)]
        assert difference(*colours, sight) >= LEAST_DIFFERENCE, (one, other, round(difference(*colours, sight)))
