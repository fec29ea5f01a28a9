# SPDX-License-Identifier: Apache-2.0
"""Xids: the numbers by which NVIDIA's driver reports errors of a GPU, what each means, and which make a node unfit. Pure.

From NVIDIA's catalogue for Ampere and newer GPUs, read in December 2026, https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html:
number, "Resolution Bucket (Immediate Action)" and description. Left out are the numbers that it calls unused, and those of video engines.

A node is unfit after an Xid whose immediate action is a reset or a restart, or a workflow of which the catalogue says that one is needed (48,
74): until then no process computes well on that GPU. These are left to what the driver itself asks for, which a probe reads:

- 109: NVIDIA's device plugin for Kubernetes counts it among the application errors, after which the GPU is healthy.
- 144 to 150: what follows depends on a subcode, which NVML doesn't report.
- 155: links that were taken down on purpose, also at the other end.
"""

from __future__ import annotations

from dynamo_mpi.common.light_typing import Any, NamedTuple

_CATALOGUE = """\
8 RESTART_APP GPU stopped processing
11 RESTART_APP invalid or corrupted push buffer stream
13 RESTART_APP graphics engine exception
25 RESTART_APP invalid or illegal push buffer stream
31 RESTART_APP GPU memory page fault
32 RESTART_APP invalid or corrupted push buffer stream
37 IGNORE driver firmware error
38 IGNORE driver firmware error
39 RESTART_APP copy engine exception
40 RESTART_APP copy engine exception
41 RESTART_APP copy engine exception
43 IGNORE GPU stopped processing
44 IGNORE graphics engine fault during context switch
45 WORKFLOW_XID_45 preemptive cleanup, due to previous errors
46 RESET_GPU GPU stopped processing
48 WORKFLOW_XID_48 double-bit ECC error
54 CHECK_MECHANICALS auxiliary power is not connected to the GPU board
62 RESET_GPU internal micro-controller halt
63 IGNORE GPU memory remapping event
64 RESET_GPU GPU memory remapping failure
66 IGNORE illegal access by driver
67 IGNORE illegal access by driver
69 RESTART_APP graphics engine class error
70 RESTART_APP copy engine error
71 RESTART_APP copy engine error
72 RESTART_APP copy engine error
74 WORKFLOW_NVLINK_ERR NVLink error
75 RESTART_APP copy engine error
76 RESTART_APP copy engine error
77 RESTART_APP copy engine error
79 RESTART_BM GPU has fallen off the bus
80 RESTART_APP corrupted data sent to GPU
85 RESTART_APP copy engine error
92 IGNORE high single-bit ECC error rate
93 IGNORE non-fatal violation of provisioned InfoROM wear limit
94 RESTART_APP contained memory error
95 RESET_GPU uncontained memory error
109 RESET_GPU context switch timeout error
110 RESET_GPU security fault error
119 RESET_GPU GSP RPC timeout
120 RESET_GPU GSP error
121 IGNORE C2C error
136 RESET_GPU link training failed
137 IGNORE NVLink privilege error
140 RESET_GPU ECC unrecovered error
141 IGNORE CUDA fast path error
143 RESET_GPU GPU initialization error
144 WORKFLOW_NVLINK5_ERR NVLink SAW error
145 WORKFLOW_NVLINK5_ERR NVLink RLW error
146 WORKFLOW_NVLINK5_ERR NVLink TLW error
147 WORKFLOW_NVLINK5_ERR NVLink TREX error
148 WORKFLOW_NVLINK5_ERR NVLink NVLPW_CTRL error
149 WORKFLOW_NVLINK5_ERR NVLink NETIR error
150 WORKFLOW_NVLINK5_ERR NVLink MSE error
151 RESTART_VM key rotation error
154 XID_154 GPU recovery action changed
155 RESET_GPU NVLink error defined by software
156 RESET_GPU resource retirement event
157 IGNORE resource retirement failure
158 RESET_GPU GPU fatal timeout
159 CHECK_UVM CHI non-data error
160 IGNORE channel retirement event
161 IGNORE channel retirement failure
167 - PCIe fatal timeout
169 - internal micro-controller halt
171 - uncorrectable DRAM error
172 - uncorrectable SRAM error
"""
_ROWS = {
    int(number): (action, text) for number, action, text in (line.split(" ", 2) for line in _CATALOGUE.splitlines())
}
_REPAIRS = frozenset(
    {"RESET_GPU", "RESTART_BM", "RESTART_VM", "CHECK_MECHANICALS", "WORKFLOW_XID_48", "WORKFLOW_NVLINK_ERR"}
)
_LEFT_TO_THE_DRIVER = frozenset({109, 155})
CAUSE_SECONDS = 900.0
"""An Xid that came longer before a failure isn't taken for its cause. Collectives of GPUs wait for minutes before they give up."""


class GpuError(NamedTuple):
    """An Xid of one GPU.

    Args:
        xid: the number.
        gpu: NVML's number of the GPU; -1 if it isn't known.
        uuid: its permanent name.
        host: its node.
        at: when, in seconds of the monotonic clock; in a failure file, of the seconds since the failure.
    """

    xid: int
    gpu: int
    uuid: str
    host: str
    at: float

    def __str__(self) -> str:
        where = f"GPU {self.gpu} ({self.uuid})" if self.gpu >= 0 else "a GPU"
        return f"Xid {self.xid} ({meaning(self.xid)}) on {where}"

    def may_be_cause(self, failed_at: float = 0.0) -> bool:
        """Return whether it makes the node unfit, and came shortly before a failure."""
        return needs_repair(self.xid) and failed_at - self.at <= CAUSE_SECONDS

    def as_document(self, failed_at: float) -> dict[str, Any]:
        """Return what failure files, and other agents, get: as the clocks of hosts differ, how long before a moment it was."""
        return {**self._asdict(), "at": round(self.at - failed_at, 3)}

    @classmethod
    def of(cls, content: Any, failed_at: float = 0.0) -> GpuError:
        """Read what `as_document` has returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        numbers = int(content["xid"]), int(content["gpu"])
        return cls(*numbers, str(content["uuid"]), str(content["host"]), float(content["at"]) + failed_at)


def meaning(xid: int) -> str:
    """Return what an Xid means."""
    return _ROWS[xid][1] if xid in _ROWS else "not in NVIDIA's catalogue of December 2026"


def needs_repair(xid: int) -> bool:
    """Return whether a GPU computes again only after a reset or a repair, according to the catalogue."""
    return xid in _ROWS and _ROWS[xid][0] in _REPAIRS and xid not in _LEFT_TO_THE_DRIVER
