# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's layout rules, model shapes, memory estimates and the planner. Pure."""
