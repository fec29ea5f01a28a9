# SPDX-License-Identifier: Apache-2.0
"""Dynamo's registration of a worker in etcd: keep it while the worker serves, and remove it at once when the worker fails."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.common.errors import DiscoveryError, DynamoMpiError, RetryableError
from dynamo_mpi.common.hooks import WorkerHook
from dynamo_mpi.discovery.etcd import EtcdAuth, LeaseLostError, lease_seconds
from dynamo_mpi.discovery.etcd_grpc import GrpcEtcdClient, missing_client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.common.log import RankLogger
    from dynamo_mpi.discovery.etcd import KeyValue

_LEASE_LOST = "etcd has lost this worker's lease: it answers, but no longer has the lease"
_STOP_SECONDS = 1.0
# dynamo.trtllm deregisters when it gets SIGTERM, and then ends its requests
_LEASES_TO_END = 2
_FAILURES = 3
_REVOKE_SECONDS, _POLL_SECONDS = 1.0, 0.02


class RegistrationMonitor:
    """Checks one worker's registration three times per lifetime of its lease, from `start` to `stop`.

    Dynamo's runtime checks only its lease, and doesn't notice an etcd that hangs. If keys are deleted while the lease exists, they are
    written again. A lost lease can't be restored, since its id is the instance's: that is reported, so that the worker can end in order
    and be started again.

    Args:
        endpoint: ``dyn://namespace.component.endpoint``.
        environ: has etcd's endpoints and our credentials.
        timeout: seconds of each call.
        log: the worker's log.
        pauses: whether the worker deregisters itself at times, as ``dynamo.trtllm`` does while its memory is released: then an
            instance that is missing while its model exists isn't written again, and if both are missing, they are written only after the
            time that the worker may take to end by itself.
        has_failed: returns whether a failure ends the worker: its lease is then revoked on purpose, and its loss is no news.
    """

    def __init__(
        self,
        endpoint: str,
        environ: Mapping[str, str],
        timeout: float,
        log: RankLogger,
        *,
        pauses: bool = False,
        has_failed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._path = endpoint.removeprefix("dyn://").replace(".", "/")
        self._environ, self._timeout, self._log, self._pauses = environ, timeout, log, pauses
        self._has_failed = has_failed
        self._etcd: GrpcEtcdClient | None = None
        # until etcd has reported it: an etcd that hangs from the start is noticed too
        self._instance, self._seconds, self._is_granted = 0, lease_seconds(environ), False
        self._known: dict[str, KeyValue] = {}
        self._seen, self._failures = 0.0, 0
        self._missing_since = 0.0
        self._refused = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, instance: int, on_lost: Callable[[RetryableError], object]) -> None:
        """Start. Does not wait, and does not raise.

        Args:
            instance: the worker's id in Dynamo's runtime, which is also the lease's.
            on_lost: called once, from a thread, when the registration is lost for good.
        """
        self._instance, self._seen = instance, time.monotonic()
        thread = threading.Thread(target=self._run, args=(on_lost,), name="registration", daemon=True)
        # set only when the thread can be joined: `stop` may run in another thread
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """Stop, before the worker deregisters itself. Waits at most a second for a pending call."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def lost_lease_reason(self) -> str:
        """After a runtime has ended by itself, return why its lease is lost, as a sentence; empty if it still exists.

        A runtime that ends in order revokes its lease, so a missing lease is a reason only if the runtime was not asked to end.
        """
        if not self._instance or missing_client():
            return ""  # it never had one, or there is no client
        try:
            return _LEASE_LOST if self._connected().lease_ttl(self._instance) is None else ""
        except DynamoMpiError as error:
            return f"etcd was away for longer than this worker's lease lives: {error.problem}"

    def _connected(self) -> GrpcEtcdClient:
        if self._etcd is None:
            self._etcd = GrpcEtcdClient.from_env(self._environ, self._timeout)
        return self._etcd

    def _run(self, on_lost: Callable[[RetryableError], object]) -> None:
        error: RetryableError | None = None
        if missing_client():  # the worker record's publisher has logged it
            return
        while error is None and not self._stopped.is_set():
            error = self._look()
            if error is None:
                self._stopped.wait(self._seconds / 3)
        if error is not None and not self._stopped.is_set() and not self._has_failed():
            on_lost(error)

    def _look(self) -> RetryableError | None:
        """Check once; return the error if the registration is lost."""
        try:
            lives = self._restore()
        except LeaseLostError:
            lives = False
        except DiscoveryError as error:
            return self._unanswered(error)
        except DynamoMpiError as error:
            self._refuse(error)
            lives = True
        self._seen, self._failures = time.monotonic(), 0
        return None if lives else lease_error(_LEASE_LOST)

    def _restore(self) -> bool:
        """Write missing keys again; return whether the lease exists.

        Raises:
            LeaseLostError: the lease was lost in the meantime.
            DiscoveryError: etcd does not answer.
            AuthorizationError: it rejects our credentials.
        """
        etcd = self._connected()
        instance, model = (f"v1/{what}/{self._path}/{self._instance:x}" for what in ("instances", "mdc"))
        found = {
            entry.key: entry
            for key in (instance, model)
            for entry in etcd.get_prefix(key)
            if entry.key == key and entry.lease == self._instance
        }
        missing = self._known.keys() - found.keys()
        self._known |= found
        if not missing:
            self._missing_since = 0.0
        if self._is_granted and not missing:
            return True
        seconds = etcd.lease_ttl(self._instance)
        if seconds is None:
            return False
        self._seconds, self._is_granted = seconds, True
        if (
            missing
            and not self._is_self_deregistration(instance in missing, model in missing)
            and not self._stopped.is_set()
        ):
            for key in sorted(missing):
                etcd.put(key, self._known[key].value, self._instance)
            self._log.info("this worker's keys in etcd had been deleted; they are written again")
        return True

    def _is_self_deregistration(self, without_instance: bool, without_model: bool) -> bool:
        if not (self._pauses and without_instance):
            return False
        if not without_model:
            return True
        self._missing_since = self._missing_since or time.monotonic()
        return time.monotonic() - self._missing_since < _LEASES_TO_END * self._seconds

    def _unanswered(self, error: DynamoMpiError) -> RetryableError | None:
        away = time.monotonic() - self._seen
        self._failures += 1
        # The runtime notices a lost etcd when its lease has expired, but it doesn't notice one that hangs. A call that was late because this
        # process was stopped is no sign that etcd hangs.
        if away < self._seconds * 4 / 3 or self._failures < _FAILURES:
            return None
        return lease_error(
            f"etcd has not answered for {away:.0f} s, longer than this worker's lease lives ({self._seconds} s): {error.problem}"
        )

    def _refuse(self, error: DynamoMpiError) -> None:
        if not self._refused:
            self._refused = True
            self._log.warning(f"whether this worker is still registered can't be checked: {error.problem}")


class InstanceLease(WorkerHook):
    """The lease of one worker's registration: revoking it deregisters the worker at once instead of after half a minute.

    Dynamo writes all keys of a worker under one lease, whose id is the instance's (``v1/instances/NAMESPACE/COMPONENT/ENDPOINT/ID``,
    hexadecimal). When its lease is lost, the runtime ends, as a worker that failed does anyway.

    Args:
        endpoint: ``dyn://namespace.component.endpoint``.
        environ: has etcd's endpoints and our credentials.
        on_lease: called with the lease's id, once it is known.

    Attributes:
        is_revoked: the worker is out of discovery.
    """

    def __init__(
        self, endpoint: str, environ: Mapping[str, str], on_lease: Callable[[int], object] = lambda _: None
    ) -> None:
        self._prefix = "v1/instances/" + endpoint.removeprefix("dyn://").replace(".", "/")
        self._environ, self._on_lease = environ, on_lease
        self._etcd: GrpcEtcdClient | None = None
        self._instance = self._lease = 0
        self.is_revoked = False

    def resolve(self, instance: int) -> None:
        """Connect, and find the lease of an instance that registers, so that `revoke` is quick. Does not raise.

        Waits at most a second until the instance exists: Dynamo's runtime writes model and instance in no fixed order.

        Args:
            instance: its id in Dynamo's runtime.
        """
        end = time.monotonic() + _REVOKE_SECONDS
        with contextlib.suppress(DynamoMpiError, ImportError):  # otherwise the keys expire with the lease
            self._etcd = GrpcEtcdClient.from_env(self._environ, _REVOKE_SECONDS)
            self._instance = instance
            while not self._find() and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)

    def on_failure_detected(self) -> None:
        """Revoke the lease, so that no more requests arrive."""
        self.revoke()

    def revoke(self) -> bool:
        """Revoke the lease, in at most two seconds; return whether the worker is deregistered. Does not raise."""
        if self._etcd is not None:
            with contextlib.suppress(DynamoMpiError):
                self._find()
                self.is_revoked |= bool(self._lease) and self._etcd.revoke(self._lease)
        return self.is_revoked

    def revoke_leftover(self) -> None:
        """After an orderly end, revoke the lease if the runtime may have been unable to: it never renews a password's token, and can't
        deregister after that has expired. Takes at most two seconds; does not raise."""
        with contextlib.suppress(DynamoMpiError):
            if EtcdAuth.from_env(self._environ).username:
                self.revoke()

    def _find(self) -> bool:
        """Look for the instance and its lease; return whether the instance exists."""
        if self._etcd is None or self._lease:
            return True
        entries = self._etcd.get_prefix(f"{self._prefix}/{self._instance:x}")
        # an instance under a lease of another id is not Dynamo's
        self._lease = next((entry.lease for entry in entries if entry.lease == self._instance), 0)
        if self._lease:
            self._on_lease(self._lease)
        return bool(entries)


def lease_error(found: str) -> RetryableError:
    """Return the error of a worker whose lease is lost."""
    return RetryableError(
        found,
        expected="an etcd that keeps this worker's lease",
        fix="start the worker again; if that happens again, check etcd and the network to it",
    )
