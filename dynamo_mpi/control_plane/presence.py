# SPDX-License-Identifier: Apache-2.0
"""A world makes itself known, and makes sure that it fits those that were there before."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynamo_mpi import __version__
from dynamo_mpi.control_plane.etcd import CredentialsError, Etcd
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.keeper import Keeper
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.control_plane.record import LAUNCH_VARIABLE, RecordedLayout, WorldRecord
from dynamo_mpi.errors import BootstrapError, LayoutError, UsageError
from dynamo_mpi.launchers.attempt import attempt_of
from dynamo_mpi.parallelism.contract import contract_of
from dynamo_mpi.preflight.inquiry import host_name
from dynamo_mpi.preflight.peers import advice, refusal
from dynamo_mpi.preflight.roster import hosts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dynamo_mpi.control_plane.record import Posted, Progress
    from dynamo_mpi.parallelism.subject import Subject
    from dynamo_mpi.preflight.inquiry import Card
    from dynamo_mpi.settings import Settings
    from dynamo_mpi.supervision.phases import Phases
    from dynamo_mpi.talk import Voice

_LEASE_SECONDS = 30
_PAIRED = ("prefill", "decode")


class Presence:
    """This world's record in etcd, while there is one.

    Args:
        voice: how rank 0 speaks.
        on_lease: called with the id of each lease that the record gets.
        on_peers: called with the peers, and with what is told of them, when they change.
    """

    def __init__(
        self,
        voice: Voice,
        on_lease: Callable[[int], object],
        on_peers: Callable[[Sequence[Posted], Sequence[str]], object] = lambda _, __: None,
    ) -> None:
        self._voice, self._on_lease, self._on_peers = voice, on_lease, on_peers
        self._keeper: Keeper | None = None
        # told before there is a record
        self._early: dict[str, Any] = {}

    def appear(self, settings: Settings, record: WorldRecord, environ: Mapping[str, str]) -> None:
        """Publish ``record``, and compare it with the peers that came first.

        Where nothing has to be compared, or ``--no-peer-check`` was given, a record that can't be written is only a warning.

        Args:
            settings: the worker's.
            record: what to say of it.
            environ: where etcd and our credentials stand.

        Raises:
            LayoutError: a peer that came first doesn't fit.
            DiscoveryError: etcd does not answer.
            AuthorisationError: it refuses us.
            UsageError: what is set for it can't be used.
        """
        if trouble := missing_client():
            self._voice.say(f"warning: no world record, and no look at peers: {trouble}")
            return
        try:
            seconds = lease_seconds(environ)
            etcd = Etcd(etcd_endpoints(environ), EtcdAuth.of(environ), settings.probe_timeout)
            record = replace(record, **self._early)
            self._keeper = Keeper(etcd, record, seconds, self._voice.say, self._on_lease, self._on_peers)
            earlier = self._keeper.publish()
            if etcd.asks_nobody:
                raise _needless()
        except (CredentialsError, UsageError):
            # Dynamo's runtime would fare no better, and try for two minutes after the load
            self.withdraw()
            raise
        except BootstrapError as error:
            if settings.role in _PAIRED and not settings.no_peer_check:
                raise
            self.withdraw()
            self._keeper = None
            self._voice.say(f"warning: no world record: {error}")
            return
        self._judge(record, earlier, seconds, refuse=not settings.no_peer_check)
        self._keeper.start()

    def tell(self, phase: str) -> None:
        """Have the record say which phase it is."""
        if self._keeper is not None:
            self._keeper.tell(phase)

    def tell_instance(self, instance: int) -> None:
        """Have the record name Dynamo's instance, which has been registered by now."""
        if self._keeper is not None:
            self._keeper.tell_instance(f"{instance:x}")

    def tell_in_flight(self, requests: int) -> None:
        """Have the record say how many requests are in flight, in a second or so. This and what follows never waits, and may be called from
        a signal's handler."""
        self._update(in_flight=requests)

    def tell_progress(self, progress: Progress) -> None:
        """Have the record say how far the ranks have come in the phase; the next phase begins without."""
        self._update(progress=progress)

    def tell_system(self, url: str | None) -> None:
        """Have the record say where ``/health``, ``/live`` and ``/metrics`` are."""
        self._update(system=url)

    def tell_trace(self, traceparent: str | None) -> None:
        """Have the record name the trace that the worker belongs to."""
        self._update(trace=traceparent)

    def tell_probe(self, figures: dict[str, Any]) -> None:
        """Have the record say what the probes have measured."""
        self._update(probe=figures)

    def withdraw(self) -> None:
        """Take the record away, in a second at the most. Does not raise, and may be called from a signal's handler."""
        if self._keeper is not None:
            self._keeper.withdraw()

    def _update(self, **fields: Any) -> None:
        if self._keeper is None:
            self._early.update(fields)
        else:
            self._keeper.update(**fields)

    def _judge(self, record: WorldRecord, earlier: Sequence[Posted], seconds: int, *, refuse: bool) -> None:
        text = refusal(record, earlier, seconds)
        if text and refuse:
            raise LayoutError(text)
        for line in advice(record, earlier):
            self._voice.say(f"preflight: {line}")


def _needless() -> UsageError:
    return UsageError(
        "ETCD_AUTH_USERNAME is set, and this etcd asks nobody who they are: Dynamo's runtime can't connect to it with a password",
        needed="no password, or an etcd with users",
        fix="unset ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, or etcdctl auth enable",
    )


def missing_client() -> str:
    """Say why etcd's client can't be used here; nothing where it can."""
    try:
        import pyetcd  # noqa: F401 - whether it can be imported is the question
    except Exception as error:  # a protobuf that doesn't suit it raises errors of its own
        return f"etcd-sdk-python can't be used ({' '.join(str(error).split())}); pip install 'etcd-sdk-python' 'protobuf>=5'"
    return ""


def lease_seconds(environ: Mapping[str, str]) -> int:
    """Return how long a record outlives its world: as long as Dynamo's own keys."""
    text = environ.get("ETCD_LEASE_TTL", "")
    return int(text) if text.isdecimal() and 0 < int(text) < 2**31 else _LEASE_SECONDS


def record_of(settings: Settings, subject: Subject, cards: Sequence[Card], phases: Phases) -> WorldRecord:
    """Say what this world is, as it stands in its preflight.

    Args:
        settings: the worker's.
        subject: what its preflight judged.
        cards: the ranks', in rank order.
        phases: rank 0's, which is in its preflight.
    """
    namespace, component, _ = settings.endpoint.removeprefix("dyn://").split(".")
    layout, nodes = subject.layout, hosts(cards)
    began = time.time() - phases.age
    return WorldRecord(
        role=settings.role,
        engine=settings.engine,
        namespace=namespace,
        component=component,
        endpoint=settings.endpoint,
        model=settings.served_model_name,
        phase="preflight",
        layout=RecordedLayout(
            layout.tp_size,
            layout.pp_size,
            layout.cp_size,
            layout.moe_ep_size,
            layout.enable_attention_dp,
            len(cards),
            len(cards) // len(nodes),
        ),
        hosts=nodes,
        contract=contract_of(subject) if settings.role in _PAIRED else None,
        dynamo_mpi=__version__,
        trtllm=None if subject.version is None else str(subject.version),
        job=os.environ.get("SLURM_JOB_ID") or None,
        step=os.environ.get("SLURM_STEP_ID") or None,
        started=began,
        phase_since=began + phases.spans[-1].began,
        pid=os.getpid(),
        host=host_name(),
        launch=os.environ.get(LAUNCH_VARIABLE) or None,
        attempt=attempt_of(os.environ),
    )
