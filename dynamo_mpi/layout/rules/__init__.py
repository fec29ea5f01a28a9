# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's rules, one module per section. Each rule is a pure function of a `LayoutSpec` that yields findings.

Every rule carries its id and where the engine has it. The engine meets them minutes into a load, as a bare ``AssertionError`` on every rank,
as a hang, or not at all.
"""
