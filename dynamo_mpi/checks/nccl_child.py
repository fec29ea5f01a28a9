# SPDX-License-Identifier: Apache-2.0
"""The process that a rank starts for the fabric check over NCCL: when it ends, in any way, the driver frees its GPU memory.

It reads commands as lines from stdin, and answers with lines on stdout; output of the libraries goes to stderr.

    ready {"library": …}     it has loaded the driver and NCCL, and sees its GPU
    <- identify              rank 0 only
    id HEX
    <- join HEX
    at STEP SIZE PEERS       before each size of each step
    took STEP SIZE SECONDS SEGMENTS RESENT WRONG
    done {"network": …}
    failed TEXT              instead of any of these
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from dynamo_mpi.checks.fabric_steps import ALL_REDUCE, EXCHANGE, Step, segments, steps_of
from dynamo_mpi.checks.hardware import HardwareCheckPlan
from dynamo_mpi.checks.nccl_library import Cuda, CudaError, Nccl, NcclError
from dynamo_mpi.common.fabric_payload import corrupt_payload, expected, expected_sum, outgoing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ctypes import c_uint64, c_void_p

# operations in a row: small ones to leave out the host's wait, large ones for the mean
_SMALL_BYTES = 1 << 20
_SMALL_REPEATS, _LARGE_REPEATS = 20, 5
# the time that they may take together: a slow link is visible by then, and is no hang
_ENOUGH_SECONDS = 0.5
_MOST_MICROSECONDS = 1 << 30
_SLACK, _WORD_BYTES = 4096, 4
_NETWORK = re.compile(rb"NCCL INFO Using network (\S+)")
_LINK = re.compile(rb"NCCL INFO Channel .* via ([A-Z0-9]+(?:/[A-Za-z]+)?)")


class Gpu(NamedTuple):
    """A rank's GPU, libraries and buffers.

    Args:
        cuda: the driver.
        nccl: the library.
        stream: the stream of its work.
        sent: send buffer on the GPU.
        got: receive buffer on the GPU.
        host: host buffer, to compare the received data.
    """

    cuda: Cuda
    nccl: Nccl
    stream: c_void_p
    sent: c_uint64
    got: c_uint64
    host: bytearray


def main() -> None:
    """Run the process: ``python -m dynamo_mpi.checks.nccl_child RANK SIZE PLAN [--spoil]``."""
    rank, size, plan = int(sys.argv[1]), int(sys.argv[2]), HardwareCheckPlan.unpack(sys.argv[3])
    if "--spoil" in sys.argv[4:]:
        corrupt_payload()
    # output of NCCL or the driver isn't meant for the rank
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    log = os.memfd_create("nccl-log")
    os.environ["NCCL_DEBUG"] = "INFO"
    # NCCL logs the network and the links at its INFO level
    os.environ.pop("NCCL_DEBUG_SUBSYS", None)
    os.environ["NCCL_DEBUG_FILE"] = f"/proc/self/fd/{log}"

    def answer(*words: object) -> None:
        print(*words, file=answers)

    try:
        _run(rank, size, plan, log, answer)
    except (CudaError, NcclError) as error:
        answer("failed", " ".join(str(error).split()), *_warning(log))
    # no destructors: they take time, and aren't needed
    _leave(answers)


def _run(rank: int, size: int, plan: HardwareCheckPlan, log: int, answer: object) -> None:
    assert callable(answer)  # noqa: S101 - it is the function above
    cuda, nccl = Cuda(), Nccl()
    if not (devices := cuda.devices):
        raise CudaError("this rank sees no GPU")
    answer("ready", json.dumps({"library": f"NCCL {nccl.version}"}))
    joined = b""
    for line in sys.stdin:
        verb, _, rest = line.strip().partition(" ")
        if verb == "identify":
            answer("id", nccl.unique_id().hex())
        elif verb == "join":
            joined = bytes.fromhex(rest)
            break
    if not joined:
        return
    # as the engine assigns it (K9)
    cuda.use(rank % devices)
    steps = steps_of(plan)
    answer("at", -1, 0, ",".join(str(other) for other in range(size) if other != rank))
    world = nccl.join(joined, size, rank)
    largest = max((step.sizes[-1] for step in steps), default=_SLACK) + _SLACK
    gpu = Gpu(cuda, nccl, cuda.stream(), cuda.allocate(largest), cuda.allocate(largest), bytearray(largest))
    comms: dict[str, c_void_p] = {}
    for step in steps:
        group = step.group_of(rank)
        if step.operation != EXCHANGE and step.kind not in comms:
            whole = len(step.groups) == 1 and len(step.groups[0]) == size
            # ranks that are in no group form one of their own
            comms[step.kind] = world if whole else nccl.split(world, min(group) if group else size, rank)
        for bytes_each in step.sizes if group else ():
            answer("at", step.number, bytes_each, ",".join(str(other) for other in group if other != rank))
            before = segments()
            seconds, wrong = _measure(gpu, step, group, rank, bytes_each, comms.get(step.kind, world))
            said = ",".join(map(str, wrong))
            answer("took", step.number, bytes_each, repr(seconds), *segments().since(before), said)
    words = _log_of(log)
    network = [match.decode("ascii", "replace") for match in _NETWORK.findall(words)]
    links = sorted({match.decode("ascii", "replace") for match in _LINK.findall(words)})
    answer("done", json.dumps({"network": network[-1] if network else "", "links": links}))


def _measure(
    gpu: Gpu, step: Step, group: tuple[int, ...], rank: int, size: int, comm: c_void_p
) -> tuple[float, list[int]]:
    """Run the operation once to check the data, then often enough to measure it."""
    if step.operation == EXCHANGE:
        (peer,) = (other for other in group if other != rank)
        sources = {peer: (0, size, expected(peer, rank, size))}
        gpu.cuda.write(gpu.sent, outgoing(rank, peer, size))
    elif step.operation == ALL_REDUCE:
        sources = {-1: (0, size, expected_sum(group, group[0], size))}
        gpu.cuda.write(gpu.sent, outgoing(rank, group[0], size))
    else:
        part = max(4, size // len(group) // 4 * 4)
        sources = {other: (at * part, part, expected(other, rank, part)) for at, other in enumerate(group)}
        gpu.cuda.write(gpu.sent, b"".join(outgoing(rank, other, part) for other in group))
    total = sum(length for _, length, _ in sources.values())
    gpu.cuda.clear(gpu.got, total)
    _once(gpu, step, group, rank, size, comm)
    gpu.cuda.wait(gpu.stream)
    gpu.cuda.read(gpu.got, gpu.host, total)
    got = memoryview(gpu.host)
    wrong = [source for source, (start, length, wanted) in sources.items() if got[start : start + length] != wanted]
    # ranks need different times to compare the data: this synchronises them again
    seconds = _time(gpu, step, group, rank, size, comm, 1)
    if repeats := _agree(gpu, step, group, rank, size, comm, seconds):
        # synchronise again
        _time(gpu, step, group, rank, size, comm, 1)
        seconds = _time(gpu, step, group, rank, size, comm, repeats)
    return seconds, list(group) if wrong == [-1] else wrong


def _time(gpu: Gpu, step: Step, group: tuple[int, ...], rank: int, size: int, comm: c_void_p, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        _once(gpu, step, group, rank, size, comm)
    gpu.cuda.wait(gpu.stream)
    return (time.perf_counter() - began) / repeats


def _agree(gpu: Gpu, step: Step, group: tuple[int, ...], rank: int, size: int, comm: c_void_p, seconds: float) -> int:
    """Agree with the group on the number of repeats: the fastest member decides, because the others waited for it. 0: once was enough."""
    mine = min(int(seconds * 1e6) + 1, _MOST_MICROSECONDS)
    gpu.cuda.write(gpu.sent, mine.to_bytes(_WORD_BYTES, "little"))
    if step.operation == ALL_REDUCE:
        gpu.nccl.minimum(gpu.sent, gpu.got, comm, gpu.stream)
        count = 1
    else:
        # the same connections as before: new ones would take time to establish
        peers = [other for other in group if other != rank] if step.operation == EXCHANGE else range(len(group))
        words = [(peer, gpu.sent.value, gpu.got.value + at * _WORD_BYTES, _WORD_BYTES) for at, peer in enumerate(peers)]
        gpu.nccl.exchange(iter(words), comm, gpu.stream)
        count = len(words)
    gpu.cuda.wait(gpu.stream)
    gpu.cuda.read(gpu.got, gpu.host, count * _WORD_BYTES)
    others = [int.from_bytes(gpu.host[at * _WORD_BYTES : (at + 1) * _WORD_BYTES], "little") for at in range(count)]
    most = _SMALL_REPEATS if size < _SMALL_BYTES else _LARGE_REPEATS
    return min(most, int(_ENOUGH_SECONDS * 1e6 / min(mine, *others)))


def _once(gpu: Gpu, step: Step, group: tuple[int, ...], rank: int, size: int, comm: c_void_p) -> None:
    if step.operation == ALL_REDUCE:
        gpu.nccl.all_reduce(gpu.sent, gpu.got, size, comm, gpu.stream)
        return
    gpu.nccl.exchange(_parts(gpu, step, group, rank, size), comm, gpu.stream)


def _parts(gpu: Gpu, step: Step, group: tuple[int, ...], rank: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    if step.operation == EXCHANGE:
        (peer,) = (other for other in group if other != rank)
        yield peer, gpu.sent.value, gpu.got.value, size
        return
    part = max(4, size // len(group) // 4 * 4)
    for at in range(len(group)):
        yield at, gpu.sent.value + at * part, gpu.got.value + at * part, part


def _log_of(log: int) -> bytes:
    with contextlib.suppress(OSError), open(f"/proc/self/fd/{log}", "rb") as file:
        return file.read()
    return b""


def _warning(log: int) -> list[str]:
    """Return NCCL's own last warning, which has more detail than its error."""
    lines = [line for line in _log_of(log).decode("utf-8", "replace").splitlines() if "NCCL WARN" in line]
    return [f"({' '.join(lines[-1].partition('NCCL WARN')[2].split())})"] if lines else []


def _leave(answers: object) -> NoReturn:
    with contextlib.suppress(OSError):
        answers.flush()  # type: ignore[attr-defined] # it is the stream above
        sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
