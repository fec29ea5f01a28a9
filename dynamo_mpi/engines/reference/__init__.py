# SPDX-License-Identifier: Apache-2.0
"""The reference engine: a tensor- and pipeline-parallel llama in numpy over MPI, which runs a real model on CPUs.

Importing this package imports neither numpy nor MPI, so that `factory` can set the number of BLAS threads first.

    factory        builds the engine of one rank from its spec
    engine         accepts requests and emits chunks: rank 0's thread steps all ranks
    loading        the parts of one rank's engine: communicators, weights, KV cache, KV server
    config         its settings
    requests       checks requests and keeps those in flight
    scheduler      continuous batching; steps: one step, as integers, and how rank 0 sends it
    transformer    the forward pass; attention: the KV cache; collectives: sums, rows, agreement; sampling: from logits to a token
    shape          sizes of a llama, and each rank's shard; weights: that shard, mapped from the converted file
    convert_gguf   converts a GGUF file to a model directory, once; gguf_model: its content
    kv_transfer    KV from prefill to decode ranks: rank 0's scheduler, each rank's worker
    kv_descriptor  which ranks hold the KV; kv_server, kv_client: over TCP, one pull; kv_wire: frames
"""
