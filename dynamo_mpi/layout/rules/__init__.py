# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's rules, a module per section of what they are about. Each is a pure function of a `Subject` that yields what it found.

Every rule carries its id and where the engine has it. The engine meets them minutes into a load, as a bare ``AssertionError`` on every rank,
as a hang, or not at all.
"""
