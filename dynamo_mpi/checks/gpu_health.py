# SPDX-License-Identifier: Apache-2.0
"""The health of a GPU, read from NVML without starting CUDA. A value that GPU, driver or nvidia-ml-py doesn't support is None, never an
error.

A value `as in nvml.h` is NVML's own number.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from dynamo_mpi.checks.gpu_facts import GpuFacts, read_gpu, visible_gpus
from dynamo_mpi.checks.nvml import is_hidden, open_nvml, optional, to_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# nvml.h; nvidia-ml-py may be older than the driver
_UNCORRECTED, _VOLATILE, _SM_CLOCK, _MEMORY_CLOCK = 1, 0, 1, 2
_MOST_LINKS = 36
_LOOK_SECONDS = 0.25
_NUMBERS = (
    "recovery_action",
    "ecc_on",
    "uncorrected",
    "remap_pending",
    "remap_failed",
    "slow_reasons",
    "links_up",
    "links",
    "compute_mode",
    "sm_mhz",
    "memory_mhz",
    "power_limit",
    "pcie_generation",
    "pcie_width",
)


class GpuHealth(NamedTuple):
    """One GPU.

    Args:
        facts: the facts that the preflight reads too, as they are now.
        driver: version of the driver.
        problem: why nothing could be read; empty if it could.
        waited: seconds of waiting until memory was freed.
        recovery_action: the recovery that the driver asks for, as in nvml.h (``NVML_GPU_RECOVERY_ACTION_*``).
        ecc_on: whether its memory corrects errors.
        uncorrected: errors of memory since the driver's start that could not be corrected.
        remap_pending: whether rows of memory wait for a reset to be replaced.
        remap_failed: whether one could not be replaced.
        slow_reasons: the reasons for low clocks, as in nvml.h (``nvmlClocksEventReason*``).
        links_up: NVLinks that are up.
        links: NVLinks that the GPU has.
        compute_mode: who may use it, as in nvml.h (``NVML_COMPUTEMODE_*``).
        sm_mhz: the highest clock of its multiprocessors.
        memory_mhz: the same of its memory.
        power_limit: milliwatts that are enforced.
        pcie_generation: of PCI Express, the highest that card and slot allow; the current one falls when the GPU idles.
        pcie_width: lanes now.
    """

    facts: GpuFacts
    driver: str = ""
    problem: str = ""
    waited: float = 0.0
    recovery_action: int | None = None
    ecc_on: int | None = None
    uncorrected: int | None = None
    remap_pending: int | None = None
    remap_failed: int | None = None
    slow_reasons: int | None = None
    links_up: int | None = None
    links: int | None = None
    compute_mode: int | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_limit: int | None = None
    pcie_generation: int | None = None
    pcie_width: int | None = None

    def pack(self) -> list[str]:
        """Write it as a list of texts, for `dynamo_mpi.common.codec`."""
        facts = self.facts
        holders = " ".join(f"{pid}:{size}" for pid, size in facts.holders)
        head = [self.driver, self.problem, repr(self.waited), facts.uuid, facts.name, holders]
        sizes = [facts.number, facts.sm, facts.total_bytes, facts.free_bytes, facts.used_bytes, int(facts.mig)]
        numbers = [getattr(self, name) for name in _NUMBERS]
        return [*head, *map(str, sizes), *("" if number is None else str(number) for number in numbers)]

    @classmethod
    def unpack(cls, values: Sequence[str]) -> GpuHealth:
        """Read what `pack` wrote."""
        driver, problem, waited, uuid, name, holders, *rest = values
        number, sm, total, free, used, mig = map(int, rest[:6])
        pairs = [pair.partition(":") for pair in holders.split()]
        held = tuple((int(pid), int(size)) for pid, _, size in pairs)
        facts = GpuFacts(number, uuid, name, sm, total, free, used, held, bool(mig))
        numbers = {key: int(text) if text else None for key, text in zip(_NUMBERS, rest[6:], strict=True)}
        return cls(facts, driver, problem, float(waited), **numbers)


def no_health(problem: str) -> GpuHealth:
    """Return the record of a GPU that can't be read."""
    return GpuHealth(GpuFacts(0, "", "", 0), problem=problem)


def health_of_rank(rank: int, environ: Mapping[str, str], is_busy: Callable[[GpuFacts], bool], end: float) -> GpuHealth:
    """Read the GPU that the engine assigns to a rank (K9), after an earlier job step has freed its memory. Never raises.

    Args:
        rank: the rank.
        environ: its environment.
        is_busy: whether so much memory is held that waiting is useful.
        end: when to stop waiting, by `time.monotonic`.
    """
    try:
        with open_nvml() as nvml:
            began = time.monotonic()
            while True:
                there = {gpu.uuid: gpu for gpu in _read_all(nvml)}
                visible = visible_gpus([*there.values()], environ)
                name = visible[rank % len(visible)] if visible else ""
                if name not in there:
                    # with GPUs of several kinds only CUDA knows the order; V1 has reported a rank that sees no GPU
                    return no_health("it isn't known which GPU this rank takes" if visible else "this rank sees no GPU")
                now = time.monotonic()
                if now >= end or not is_busy(there[name]):
                    return _read_health(nvml, there[name])._replace(waited=round(now - began, 2))
                time.sleep(min(_LOOK_SECONDS, end - now))
    except Exception as error:  # of the driver or of nvidia-ml-py, or one of them is missing
        return no_health(" ".join(str(error).split()) or type(error).__name__)


def health_of_node() -> list[GpuHealth]:
    """Read all GPUs of this machine. Never raises; empty if there are none, one entry without facts if they can't be read."""
    try:
        with open_nvml() as nvml:
            return [_read_health(nvml, facts) for facts in _read_all(nvml)]
    except ImportError:
        return []
    except Exception as error:  # of the driver
        if type(error).__name__ in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
            return []
        return [no_health(" ".join(str(error).split()) or type(error).__name__)]


def health_of_gpus(gpus: Sequence[GpuFacts]) -> list[GpuHealth]:
    """Read the health of GPUs of this machine, whose facts are known.

    Raises:
        Exception: NVML's own, or nvidia-ml-py isn't installed.
    """
    with open_nvml() as nvml:
        return [_read_health(nvml, facts) for facts in gpus]


def _read_all(nvml: Any) -> list[GpuFacts]:
    """Read the GPUs as the preflight does, without those that a cgroup hides."""
    gpus = []
    for index in range(int(nvml.nvmlDeviceGetCount())):
        try:
            gpus.append(read_gpu(nvml, index))
        except Exception as error:
            if not is_hidden(error):
                raise
    return gpus


def _read_health(nvml: Any, facts: GpuFacts) -> GpuHealth:
    handle = nvml.nvmlDeviceGetHandleByIndex(facts.number)
    remapped = optional(nvml, "nvmlDeviceGetRemappedRows", handle)
    ecc = optional(nvml, "nvmlDeviceGetEccMode", handle)
    reasons = optional(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # its name until driver 535
        reasons = optional(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    states = [optional(nvml, "nvmlDeviceGetNvLinkState", handle, link) for link in range(_MOST_LINKS)]
    links = [state for state in states if state is not None]

    def number(name: str, *arguments: Any) -> int | None:
        value = optional(nvml, name, handle, *arguments)
        return None if value is None else int(value)

    return GpuHealth(
        facts,
        to_text(optional(nvml, "nvmlSystemGetDriverVersion") or ""),
        recovery_action=_field(nvml, handle, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION"),
        ecc_on=None if ecc is None else int(ecc[0]),
        uncorrected=number("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE),
        # corrected, uncorrected, pending, failed
        remap_pending=None if remapped is None else int(remapped[2]),
        remap_failed=None if remapped is None else int(remapped[3]),
        slow_reasons=None if reasons is None else int(reasons),
        links_up=sum(map(bool, links)),
        links=len(links),
        compute_mode=number("nvmlDeviceGetComputeMode"),
        sm_mhz=number("nvmlDeviceGetMaxClockInfo", _SM_CLOCK),
        memory_mhz=number("nvmlDeviceGetMaxClockInfo", _MEMORY_CLOCK),
        power_limit=number("nvmlDeviceGetEnforcedPowerLimit"),
        pcie_generation=number("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=number("nvmlDeviceGetCurrPcieLinkWidth"),
    )


def _field(nvml: Any, handle: Any, name: str) -> int | None:
    number = getattr(nvml, name, None)
    values = None if number is None else optional(nvml, "nvmlDeviceGetFieldValues", handle, [number])
    if not values or values[0].nvmlReturn != 0:
        return None
    return int(values[0].value.uiVal)
