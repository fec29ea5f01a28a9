# SPDX-License-Identifier: Apache-2.0
"""The lowest acceptable bandwidth between two GPUs of one node, if the kind of GPU and its link are known.

NVLink: a quarter of one direction of NVIDIA's figure for the GPU (product pages: A100 600 GB/s, H100, H200, H20 and GH200 900 GB/s, B200,
GB200, B300 and GB300 1800 GB/s, both directions together). docs/probe.md has what two H200s reached. PCI Express: an eighth of what the
generation carries over 16 lanes one way (PCI-SIG: 16, 32, 64 GB/s for generations 3, 4, 5), since messages may go over the host's memory.
A lower bandwidth means that a link is down or missing; tuning doesn't explain it.
"""

from __future__ import annotations

_GB = 1e9
_NVLINK = {
    "a100": 300 * _GB,
    "a100-40": 300 * _GB,
    "h100": 450 * _GB,
    "h200": 450 * _GB,
    "h20": 450 * _GB,
    "gh200": 450 * _GB,
    "b200": 900 * _GB,
    "gb200": 900 * _GB,
    "b300": 900 * _GB,
    "gb300": 900 * _GB,
}
_PCIE = {3: 16 * _GB, 4: 32 * _GB, 5: 64 * _GB, 6: 128 * _GB}


def least_rate(kind: str | None, nvlinks: int | None, pcie: int | None) -> tuple[float, str] | None:
    """Return the lowest acceptable bytes per second and the name of the link; None if they aren't known.

    Args:
        kind: as `layout.gpus` names it.
        nvlinks: links of the GPU that are up; None if that isn't known.
        pcie: generation of PCI Express; None if it isn't known.
    """
    if nvlinks and kind in _NVLINK:
        return _NVLINK[kind] / 4, f"NVLink of {kind}"
    if nvlinks == 0 and pcie in _PCIE:
        return _PCIE[pcie] / 8, f"PCI Express {pcie}"
    return None
