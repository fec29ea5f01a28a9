# SPDX-License-Identifier: Apache-2.0
"""Pure rules: model shape, engine config, layout, and what TensorRT-LLM makes of them."""
