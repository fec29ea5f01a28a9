# SPDX-License-Identifier: Apache-2.0
"""A stand-in for TensorRT-LLM, for tests: the unmodified ``dynamo.trtllm`` and our bootstrap run over it, without a GPU.

It has the names that these two use and no others, behaves towards MPI, its launcher and its proxy like the real one (fact
sheet K1 to K19), and computes with the reference engine on all ranks. What it doesn't know it refuses: constructor
arguments and attributes as Python and pydantic do, features with NotImplementedError. Put ``tests/standins`` on PYTHONPATH.

The real engine hands KV over and fetches it alike; the reference engine is loaded for one of the two. Which, the command line of
``dynamo.trtllm`` says (``--disaggregation-mode``).

Environment, beside TensorRT-LLM's own ``TRT_LLM_NO_LIB_INIT`` and ``TLLM_SPAWN_PROXY_PROCESS*``:

``STANDIN_TRTLLM_VERSION``
    What ``__version__`` says, default 1.3.0rc22 (package metadata always says that). From 1.4.0rc0 on a worker's error
    reaches the proxy (``RemoteWorkerDeath``), a session of another size is refused, and the pool over COMM_WORLD outlives
    its session. Before, the proxy waits for ever.
``STANDIN_TRTLLM_FAULT``
    One of ``raise:RANK`` (RuntimeError in that rank's task, before its engine is built), ``fail:RANK`` or ``fail:all`` (ValueError
    while the engine is built: as with the real worker, each such rank logs it and returns, and rank 0 sends it to the proxy, which
    raises "Executor worker returned error" from it), ``hang:RANK`` (it never comes back from loading), ``die:RANK`` (``os._exit(3)``
    while it loads), ``crash:RANK``, ``stick:RANK`` (a second after loading, the real one's hard kill, with 137 for all ranks: its
    loop crashed, or hangs), ``slow:SECONDS`` (every rank takes that long to load),
    ``lose-lease:SECONDS`` (that long after loading, the process that holds the LLM ends in order without having been asked,
    with code 0), ``unhealthy:SECONDS`` (that long after loading, the LLM is found dead), ``nan:0`` (log probabilities are no numbers).
``STANDIN_TRTLLM_KERNELS``
    How many kernels each rank compiles while it loads, see `_compiling`; none without it.
``STANDIN_TRTLLM_END_SECONDS``
    How long the process that holds the LLM goes on after a failed start.
"""

from __future__ import annotations

from ._environment import VERSION
from ._utils import set_mpi_comm
from .llmapi.llm import LLM, MultimodalEncoder

__all__ = ["LLM", "MultimodalEncoder", "__version__", "set_mpi_comm"]
__version__ = VERSION
