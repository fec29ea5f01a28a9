# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for `compile_caches`: a module of their own, as importing it needs triton."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-not-found]  # only where there is a GPU
import triton.language as tl  # type: ignore[import-not-found]


@triton.jit  # type: ignore[untyped-decorator]
def _matmul(a, b, c, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton reads annotations itself
    row, column = tl.program_id(0), tl.program_id(1)
    rows, columns = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(STEPS):
        k = step * BLOCK + inner
        total += tl.dot(tl.load(a + rows[:, None] * n + k[None, :]), tl.load(b + k[:, None] * n + columns[None, :]))
    tl.store(c + rows[:, None] * n + columns[None, :], total)


def launch_all(torch: Any) -> None:
    """Compile the kernel in seven ways, and run each."""
    n = 512
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for block, warps in ((16, 1), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8)):
        c = torch.empty(n, n, device="cuda", dtype=torch.float32)
        _matmul[(n // block, n // block)](a, b, c, n, BLOCK=block, STEPS=n // block, num_warps=warps)
        torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-1, atol=1.0)
