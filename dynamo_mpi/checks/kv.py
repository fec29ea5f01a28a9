# SPDX-License-Identifier: Apache-2.0
"""The KV check: before any worker starts, each decode host pulls a checked pattern from each prefill host; then it ends.

    SLURM_PMIX_FENCE=tree srun --mpi=pmix --ntasks-per-node=1 … python -m dynamo_mpi.checks.kv --prefill n1,n2 --decode n3,n4
    mpirun --host n1:1,n2:1,n3:1,n4:1 --map-by ppr:1:node … python -m dynamo_mpi.checks.kv --prefill n1,n2 --decode n3,n4

`dynamo-mpi launch` runs it by itself. One rank per host; rank 0 makes a key, assigns the pairs, and evaluates the results (`kv_rules`). If a
pair is disconnected, slow, or gets wrong bytes, the exit code is 75; for a wrong command, 64. If a host doesn't answer, only its own pairs
fail.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn

from dynamo_mpi.checks import kv_pull, kv_rules
from dynamo_mpi.checks.kv_pull import CONNECT_SECONDS, FAILED, NIXL, PULL_SECONDS, TCP, PairResult, Source
from dynamo_mpi.common.errors import (
    DynamoMpiError,
    ExitCode,
    LaunchError,
    PhaseTimeoutError,
    RetryableError,
    UsageError,
)
from dynamo_mpi.common.host_address import host_address
from dynamo_mpi.common.log import RankLogger
from dynamo_mpi.common.process import hard_exit_after, host_name
from dynamo_mpi.layout.finding import errors, render
from dynamo_mpi.layout.format import counted, listed
from dynamo_mpi.mpi.launcher import Launcher, check_launch, detect_launcher, identify_mpi
from dynamo_mpi.mpi.world import finalize_mpi, load_mpi_library, start_mpi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from mpi4py import MPI

    Content = dict[str, Any]

from dynamo_mpi.checks.kv_settings import KvCheckSettings, find_host, read_settings

START_SECONDS = 600.0
"""Time limit until all ranks have started, including the import of a container image."""
# time limits: for each rank's first message, to load NIXL, for one pair
HELLO_SECONDS, _LOAD_SECONDS, _ROUND_SECONDS = 15.0, 20.0, CONNECT_SECONDS + PULL_SECONDS + 4.0
_MOST_AGAIN = 4
_REST_SECONDS = HELLO_SECONDS + _LOAD_SECONDS + (_MOST_AGAIN + 1) * _ROUND_SECONDS
_POLL_SECONDS, _PART_SECONDS, _LEAVE_SECONDS = 0.002, 1.0, 5.0


def rounds(prefill: Sequence[str], decode: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return all pairs, in rounds in which no host is twice."""
    count = max(len(prefill), len(decode))
    places = [[(number, (number + turn) % count) for number in range(len(decode))] for turn in range(count)]
    return [[(prefill[p], decode[d]) for d, p in turn if p < len(prefill)] for turn in places]


class Mail:
    """Messages between rank 0 and each other rank, as JSON. Not by collectives: one lost host would block all ranks in them."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self.wait: Callable[[], None] = lambda: time.sleep(_POLL_SECONDS)
        self._unsent: list[object] = []

    def send(self, rank: int, content: Content) -> None:
        """Send a message; only the answer shows whether it arrived."""
        data = json.dumps(content).encode()
        self._unsent.append((self._comm.Isend(data, rank), data))

    def receive(self, rank: int, end: float) -> Content | None:
        """Return the next message of a rank; None if there is none by ``end``, of `time.monotonic`."""
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.Improbe(rank, MPI.ANY_TAG, status)) is None:
            if time.monotonic() > end:
                return None
            self.wait()
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
        return dict(json.loads(data))


class KvPathCheck:
    """One rank's part; the settings are the same in all of them."""

    def __init__(self, settings: KvCheckSettings, mail: Mail, log: RankLogger) -> None:
        self._settings, self._mail, self._log = settings, mail, log
        self._host, self._key, self._corrupt = "", b"", False
        self._server: kv_pull.PatternServer | None = None
        self._agent: kv_pull.NixlAgent | None = None
        # on rank 0: the ranks that answer, and why others don't
        self._ranks: dict[str, int] = {}
        self._lost: dict[str, str] = {}

    def run(self) -> int:
        """Run this rank's part until rank 0 has the result; return the exit code, which is 0 on other ranks that got rank 0's last
        message."""
        hello, code = self._introduction(), 0
        try:
            if self._mail.rank:
                return self._follow(hello)
            self._lead(hello)
        except DynamoMpiError as error:
            code = error.exit_code
            self._log.error(f"error in kv check: {error}")
        for rank in range(1, self._mail.size if self._mail.rank == 0 else 0):
            self._mail.send(rank, {"end": True})
        return code

    def _introduction(self) -> Content:
        try:
            self._host = find_host((*self._settings.prefill, *self._settings.decode), os.environ)
            self._corrupt = _is_corrupt(self._mail.rank, os.environ)
            address, port = host_address(self._settings.kv_network, "--kv-network / DYN_MPI_KV_NETWORK"), 0
            if self._host in self._settings.prefill:
                self._server = kv_pull.PatternServer(address)
                port = self._server.port
        except (DynamoMpiError, OSError) as error:
            return {"host": host_name(), "problem": str(error)}
        return {"host": self._host, "address": address, "port": port, "nixl": kv_pull.nixl_installed()}

    def _follow(self, hello: Content) -> int:
        self._mail.send(0, hello)
        seconds = 2 * HELLO_SECONDS
        while (order := self._mail.receive(0, time.monotonic() + seconds)) is not None:
            if "end" in order:
                return 0
            seconds = self._settings.seconds + _REST_SECONDS
            self._mail.send(0, self._handle_order(order))
        raise RetryableError(
            f"rank 0 has sent nothing for {seconds:.0f} s",
            expected="an order from rank 0, or its end",
            fix="read what rank 0 reports",
        )

    def _handle_order(self, order: Content) -> Content:
        """Pull from a source, or prepare for that."""
        if "source" in order:
            return {"result": kv_pull.run_pair(Source(*order["source"]), self._host, self._key, self._agent)}
        self._key = bytes.fromhex(order["key"])
        data = kv_pull.pattern(self._key, self._host, corrupt=self._corrupt)
        if self._server is not None:
            self._server.start(self._key, data)
        if order["transport"] == TCP:
            return {"shared": ()}
        try:
            self._agent = kv_pull.NixlAgent()
            shared = self._agent.share(data)
        except kv_pull.NixlError as error:
            return {"problem": f"{self._host}: {error}"}
        if self._server is not None:
            self._mail.wait = self._agent.progress
        return {"shared": shared}

    def _lead(self, own: Content) -> None:
        """Have all pairs checked, and apply the rules. RetryableError for a pair that fails, UsageError for ranks that the command doesn't
        name."""
        began, settings = time.monotonic(), self._settings
        hellos = [own]
        for rank in range(1, self._mail.size):
            hellos.append(self._mail.receive(rank, began + HELLO_SECONDS) or {})
        self._require_fit(hellos)
        self._ranks = {hello["host"]: rank for rank, hello in enumerate(hellos) if hello}
        missing = {*settings.prefill, *settings.decode} - self._ranks.keys()
        self._lost = {host: f"{host} sends nothing to rank 0 on {self._host}" for host in missing}
        without = [h["host"] for h in hellos if h and not h["nixl"]] if settings.transport != TCP else []
        if settings.transport == NIXL and without:
            raise UsageError(
                f"NIXL is not installed on {listed(without)}",
                expected="NIXL on every host of the check",
                fix="install it there, or --transport tcp",
            )
        transport = TCP if without or settings.transport == TCP else NIXL
        order = {"key": secrets.token_hex(32), "transport": transport}
        opened = self._order(dict.fromkeys(self._ranks, order), _LOAD_SECONDS)
        sources = {
            h["host"]: (h["host"], h["address"], h["port"], *opened[h["host"]]["shared"])
            for h in hellos
            if h.get("host") in opened
        }
        results: list[PairResult] = []
        for pairs in rounds(settings.prefill, settings.decode):
            if time.monotonic() < began + settings.seconds:
                results += self._pull(pairs, sources, transport)
        # once more, one at a time: others may have used the CPUs or the network
        for pair in list(kv_rules.slow_pairs(results, settings.min_rate * 1e9))[:_MOST_AGAIN]:
            (again,) = self._pull([(pair.prefill, pair.decode)], sources, transport)
            results[results.index(pair)] = again._replace(wrong=pair.wrong or again.wrong)
        skipped = len(settings.prefill) * len(settings.decode) - len(results)
        findings = [*kv_rules.check_kv(results, settings.min_rate * 1e9), *kv_rules.check_coverage(without, skipped)]
        if found := errors(findings):
            raise RetryableError(f"{counted(len(found), 'error')}, no worker was started\n{render(findings)}")
        line = f"kv check: {kv_rules.summary(results)}; {time.monotonic() - began:.1f} s"
        self._log.info("\n".join(filter(None, (line, render(findings)))))

    def _require_fit(self, hellos: Sequence[Content]) -> None:
        found = [hello["host"] for hello in hellos if hello]
        hosts = (*self._settings.prefill, *self._settings.decode)
        if problems := [f"{hello['host']}: {hello['problem']}" for hello in hellos if "problem" in hello]:
            raise UsageError(problems[0])
        if len(hellos) != len(hosts) or len(set(found)) < len(found):
            raise UsageError(
                f"{counted(len(hellos), 'rank')} on {listed(sorted(found))}, for {counted(len(hosts), 'host')}",
                expected=f"one rank on each of {listed(hosts)}",
                fix="srun --ntasks-per-node=1, or mpirun --map-by ppr:1:node",
            )

    def _pull(
        self, pairs: Iterable[tuple[str, str]], sources: Mapping[str, Sequence[Any]], transport: str
    ) -> list[PairResult]:
        orders = {d: {"source": sources[p]} for p, d in pairs if p in sources and d in self._ranks}
        answers = self._order(orders, _ROUND_SECONDS)
        return [
            PairResult.of(answers[d]["result"])
            if d in answers
            else PairResult(p, d, transport, FAILED, self._lost.get(p) or self._lost[d])
            for p, d in pairs
        ]

    def _order(self, orders: Mapping[str, Content], seconds: float) -> dict[str, Content]:
        """Send orders to hosts; return their answers. A host that doesn't answer gets no more orders."""
        end, answers = time.monotonic() + seconds, {}
        for host, order in orders.items():
            if host != self._host:
                self._mail.send(self._ranks[host], order)
        for host in sorted(orders, key=self._ranks.__getitem__):  # rank 0 itself first
            own = host == self._host
            answer = self._handle_order(orders[host]) if own else self._mail.receive(self._ranks[host], end)
            if answer is None or "problem" in answer:
                at = f" while it pulled from {orders[host]['source'][0]}" if "source" in orders[host] else ""
                self._lost[host] = answer["problem"] if answer else f"{host} gave no answer in {seconds:g} s{at}"
                del self._ranks[host]
            else:
                answers[host] = answer
        return answers


def _is_corrupt(rank: int, environ: Mapping[str, str]) -> bool:
    """Return whether this rank must send a wrong byte: an injected fault."""
    if not environ.get("DYN_MPI_FAULT") or environ.get("DYN_MPI_ALLOW_FAULTS") != "1":
        return False
    from dynamo_mpi.supervisor.fault_injection import parse_fault

    fault = parse_fault(environ["DYN_MPI_FAULT"])
    return (fault.rank, fault.action) == (rank, "corrupt")


def _never_started(log: RankLogger) -> NoReturn:
    error = PhaseTimeoutError(
        f"MPI has not started in {START_SECONDS:g} s",
        expected="all ranks of the check, started by one srun or mpirun",
        fix="check that all hosts reach each other",
    )
    log.error(f"error in kv check: {error}")
    os._exit(error.exit_code)


def main(argv: Sequence[str]) -> int:
    """Run the check as one rank; return its exit code."""
    launch = detect_launcher(os.environ)
    log = RankLogger(launch.rank, host_name())
    try:
        settings = read_settings(argv, os.environ)
        if launch.launcher is Launcher.ALONE:
            # refused before MPI starts: without a launcher, Open MPI leaves 16 MiB in /dev/shm
            raise LaunchError(
                "the KV check was started without a launcher",
                expected="one rank on each host of --prefill and --decode",
                fix="srun --mpi=pmix --ntasks-per-node=1, or mpirun --map-by ppr:1:node",
            )
        check_launch(launch, identify_mpi(load_mpi_library()))
        late = threading.Timer(START_SECONDS, _never_started, (log,))
        late.daemon = True
        late.start()
        start_mpi()
        late.cancel()
    except DynamoMpiError as error:
        if launch.rank == 0:
            log.error(f"error in kv check: {error}")
        return error.exit_code
    from mpi4py import MPI

    # this ends a process that hangs in native code
    hard_exit_after(settings.seconds + _REST_SECONDS + 2 * HELLO_SECONDS, ExitCode.DEADLINE)
    code = KvPathCheck(settings, Mail(MPI.COMM_WORLD), log).run()
    hard_exit_after(_LEAVE_SECONDS, code)
    finalize_mpi()
    # mpirun kills the other ranks when one exits with an error, and Open MPI 5's crashes if one of them is finalizing PMIx at that moment
    time.sleep(_PART_SECONDS if code else 0.0)
    return code


if __name__ == "__main__":
    # no destructors: NIXL's may wait for peers that have exited
    os._exit(main(sys.argv[1:]))
