# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM in this world: rank 0 serves TensorRT-LLM's session, all ranks run its tasks, and ``dynamo.trtllm``, unmodified, runs as
rank 0's child outside MPI.

    rank 0  MPI process: session server <--- TensorRT-LLM's proxy channel (unix socket, HMAC) ---> dynamo.trtllm (child)
    rank n  MPI process: serves the session's executor
"""
