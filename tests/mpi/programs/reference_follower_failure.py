# SPDX-License-Identifier: Apache-2.0
"""Break rank 1's second step: the error must come out of ``follow``, and ends the world with code 70."""

from __future__ import annotations

import sys
from pathlib import Path

from mpi4py import MPI

from dynamo_mpi.engines.protocol import GenerationRequest
from dynamo_mpi.engines.reference.engine import ReferenceConfig, ReferenceEngine
from dynamo_mpi.engines.reference.steps import StepPlan
from dynamo_mpi.engines.reference.weights import Float32Array


def main() -> None:
    comm = MPI.COMM_WORLD
    engine = ReferenceEngine(comm, ReferenceConfig(Path(sys.argv[1]), comm.Get_size()))
    engine.load()
    if comm.Get_rank() == 0:
        engine.start()
        engine.submit(GenerationRequest("a", (1, 2, 3), 50), lambda chunk: None)
        MPI.COMM_WORLD.Barrier()  # never comes back: it is rank 1 that ends this
    if comm.Get_rank() == 1:
        transformer = engine._require_loaded().transformer
        forward, steps = transformer.forward, iter(range(100))

        def failing(plan: StepPlan) -> Float32Array | None:
            if next(steps) == 1:
                raise FloatingPointError("rank 1 lost its weights")
            return forward(plan)

        transformer.forward = failing  # type: ignore[method-assign]  # a step that breaks on this rank alone
    try:
        engine.follow()
    except FloatingPointError as error:
        print(f"follow raised: {error}", file=sys.stderr, flush=True)
        comm.Abort(70)


if __name__ == "__main__":
    main()
