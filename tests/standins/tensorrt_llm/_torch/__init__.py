# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's PyTorch backend, of which dynamo.trtllm names one class."""
