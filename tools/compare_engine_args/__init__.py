# SPDX-License-Identifier: Apache-2.0
"""Compares TensorRT-LLM's ``llmapi/llm_args.py`` with the tables of ``dynamo_mpi/layout``, and adds a version to them."""
