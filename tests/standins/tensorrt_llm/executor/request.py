# SPDX-License-Identifier: Apache-2.0
"""Requests on their way to the workers."""

from __future__ import annotations

from typing import NamedTuple

from dynamo_mpi.engines.protocol import GenerationRequest as EngineRequest

DEFAULT_REQUEST_PRIORITY = 0.5


class Submission(NamedTuple):
    """A request to start."""

    request: EngineRequest


class CancellingRequest(NamedTuple):
    """A request to end."""

    request_id: str
