# SPDX-License-Identifier: Apache-2.0
"""The trace that a worker belongs to, by W3C Trace Context (``TRACEPARENT`` and ``TRACESTATE``). Pure."""

from __future__ import annotations

import re

from dynamo_mpi.common.light_typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

PARENT_VARIABLE, STATE_VARIABLE = "TRACEPARENT", "TRACESTATE"
# version 00 has four fields; later versions may have more, which are ignored
_FORM = r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"


class Trace(NamedTuple):
    """The trace to which this worker belongs.

    Args:
        parent: the whole traceparent, unchanged.
        trace_id: 32 hexadecimal digits.
        span_id: the parent's span, 16 hexadecimal digits.
        flags: 1 if the trace is sampled.
        state: the tracestate, unchanged; empty for none.
    """

    parent: str
    trace_id: str
    span_id: str
    flags: int
    state: str = ""


def trace_of(environ: Mapping[str, str]) -> Trace | None:
    """Return the trace of an environment; None if there is none, or an invalid one, which the specification requires to ignore together
    with ``TRACESTATE``."""
    text = environ.get(PARENT_VARIABLE, "").strip()
    match = re.fullmatch(_FORM, text)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return Trace(text, trace_id, span_id, int(flags, 16), environ.get(STATE_VARIABLE, "").strip())


def invalid_reason(environ: Mapping[str, str]) -> str:
    """Return why the traceparent can't be used; empty if it can, or if none is set."""
    text = environ.get(PARENT_VARIABLE, "")
    if not text.strip() or trace_of(environ) is not None:
        return ""
    return (
        f"{PARENT_VARIABLE} is {text[:80]!r}, which names no trace: this worker runs without one; expected: "
        "00-TRACE_ID-PARENT_ID-FLAGS with 32, 16 and 2 hexadecimal digits in lower case, the ids not all zero"
    )


def remove_invalid(environ: MutableMapping[str, str]) -> str:
    """Remove a trace that can't be used, as the engine and Dynamo would read and report it again; return `invalid_reason`."""
    reason = invalid_reason(environ)
    if reason:
        for name in (PARENT_VARIABLE, STATE_VARIABLE):
            environ.pop(name, None)
    return reason
