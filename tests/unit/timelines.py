# SPDX-License-Identifier: Apache-2.0
"""Starts as workers might report them, of any size."""

from __future__ import annotations

import random
from dataclasses import replace

from dynamo_mpi.common.phases import PROCESS_START, RankTimings, Span
from dynamo_mpi.discovery.records import RecordedLayout
from dynamo_mpi.telemetry.startup_trace import ENDED, FAILED, READY, FailureMark, StartupTrace

BEGAN = 1_800_000_000.0
# no name may be taken for a part of the page
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def start_of(
    ranks: int,
    per_node: int = 8,
    *,
    name: str = "prefill-0",
    load: float = 110.0,
    slow: int | None = None,
    began: float = BEGAN,
    serving: float | None = None,
    failed: int | None = None,
    model: str = "DeepSeek-R1",
    host: str = "n{:03}",
) -> StartupTrace:
    """Return a start.

    Args:
        ranks: how many.
        per_node: of them.
        name: of the worker.
        load: seconds that loading takes, about.
        slow: the rank that loads longer, a quarter again; by default three quarters down.
        began: when it began.
        serving: seconds that it served until it ended; None where it has just become ready.
        failed: the rank that failed to load, if any.
        model: its name.
        host: a node's name, with a place for its number.
    """
    chance = random.Random(ranks)  # noqa: S311 - for a picture
    slow = ranks * 3 // 4 if slow is None else slow
    own = [load * chance.uniform(0.9, 1.05) * (1.28 if rank == slow else 1.0) for rank in range(ranks)]
    births = [chance.uniform(0.0, 1.5) for _ in range(ranks)]
    joined, judged = max(births) + 4.0, max(births) + 6.0
    probed = judged + 3.0
    loaded = probed + max(own)
    stopped = None if failed is None else probed + load * 0.6
    timings = []
    for rank, birth in enumerate(births):
        spans = [
            Span(PROCESS_START, -0.8, None, 0.8),
            Span("environment", 0.0, None, 0.02),
            Span("mpi_init", 0.02, None, joined - birth - 0.02),
            Span("preflight", joined - birth, 0.7, judged - joined),
            Span("hardware_check", judged - birth, 2.4, probed - judged),
        ]
        load_began = probed - birth
        if stopped is not None:
            done = own[rank] if own[rank] < stopped - probed else None
            spans.append(Span("load", load_began, stopped - probed if rank == failed else done, None))
        else:
            spans.append(Span("load", load_began, own[rank], loaded - probed))
            spans.append(Span("warmup", loaded - birth, 0.9, 3.0))
            spans.append(Span("register", loaded - birth + 3.0, None, 1.6))
            spans.append(Span("serve", loaded - birth + 4.6, None, serving))
            if serving is not None:
                spans.append(Span("drain", loaded - birth + 4.6 + serving, 1.0, 4.0))
                spans.append(Span("exit", loaded - birth + 8.6 + serving, None, 2.0))
        timings.append(RankTimings(rank, host.format(rank // per_node), began + 0.8 + birth, tuple(spans)))
    ready = None if stopped is not None else began + 0.8 + loaded + 4.6
    written = began + 0.8 + (stopped if stopped is not None else loaded + 4.7 + ((serving or 0) + 6 if serving else 0))
    return StartupTrace(
        name=name,
        role="prefill",
        engine="trtllm",
        model=model,
        endpoint="dyn://dynamo.prefill.generate",
        outcome=FAILED if stopped is not None else READY if serving is None else ENDED,
        written=written,
        ready=ready,
        ranks=tuple(timings),
        layout=RecordedLayout(min(ranks, 16), max(1, ranks // 16), 1, min(ranks, 16), False, ranks, per_node),
        failure=None if failed is None else failure_mark(failed, host.format(failed // per_node)),
        job="4711",
        step="2",
    )


def failure_mark(
    rank: int, host: str, error: str = "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"
) -> FailureMark:
    """Return why a rank failed."""
    return FailureMark(rank, host, "load", error, 70)


def skewed() -> StartupTrace:
    """Return a start with phases that have negative lengths or lie over each other, and with a rank that has reported nothing."""
    start = start_of(4, 2)
    first, second, *others = start.ranks
    spans = second.spans
    odd = (
        *spans[:2],
        spans[2]._replace(began=-50.0),
        spans[3]._replace(total=-3.0),
        spans[4]._replace(local=1e6),
        *spans[5:],
    )
    ranks = (first, second._replace(spans=odd), *others, RankTimings(4, "n9", 0.0, ()))
    return replace(start, ranks=ranks)


def services() -> StartupTrace:
    """Return what the services of a deployment reported."""
    parts = [
        RankTimings(at, "n0", BEGAN, (Span(name, 0.0, None, 1.0 + at),)) for at, name in enumerate(("etcd", "nats"))
    ]
    return StartupTrace("services", "launch", "", "", "", ENDED, BEGAN + 10, None, tuple(parts))
