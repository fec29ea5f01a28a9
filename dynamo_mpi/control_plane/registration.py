# SPDX-License-Identifier: Apache-2.0
"""Sees to it that a worker which serves is registered: Dynamo's runtime looks at its lease alone, and not at all while etcd hangs.

What somebody has deleted from under a lease that lives is written again. A lease that is lost can't be had again, since the runtime's
instance is its id: that is told, so that the worker can end in order and be started anew.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.etcd import Etcd, LeaseLostError
from dynamo_mpi.control_plane.etcd_auth import EtcdAuth
from dynamo_mpi.control_plane.presence import lease_seconds, missing_client
from dynamo_mpi.control_plane.probe import etcd_endpoints
from dynamo_mpi.errors import BootstrapError, DiscoveryError, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dynamo_mpi.control_plane.etcd import Entry
    from dynamo_mpi.talk import RankLogger

_FORGOTTEN = "etcd has lost this worker's lease: it answers, and doesn't know it any more"
_FAREWELL_SECONDS = 1.0
# dynamo.trtllm that is told to stop deregisters, and ends its requests
_LEASES_TO_END = 2
_FAILURES = 3


class RegistrationWatch:
    """Watches over one worker's registration, from `begin` to `stop`, three times in its lease's life.

    Args:
        endpoint: ``dyn://namespace.component.endpoint``.
        environ: where etcd and our credentials stand.
        timeout: seconds of each question.
        log: the worker's log.
        pauses: the worker takes itself out of discovery at times, as ``dynamo.trtllm`` does while its memory is released: then an
            instance that is missing while its model is there isn't written again, and both only when they have been missing for longer
            than it may take to end by itself.
    """

    def __init__(
        self,
        endpoint: str,
        environ: Mapping[str, str],
        timeout: float,
        log: RankLogger,
        *,
        pauses: bool = False,
    ) -> None:
        self._path = endpoint.removeprefix("dyn://").replace(".", "/")
        self._environ, self._timeout, self._log, self._pauses = environ, timeout, log, pauses
        self._etcd: Etcd | None = None
        # until etcd has said it: who freezes at once is noticed too
        self._instance, self._seconds, self._is_granted = 0, lease_seconds(environ), False
        self._known: dict[str, Entry] = {}
        self._seen, self._failures = 0.0, 0
        self._missing_since = 0.0
        self._refused = False
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, instance: int, on_lost: Callable[[TemporaryError], object]) -> None:
        """Begin. Does not wait, and does not raise.

        Args:
            instance: the worker's id, as Dynamo's runtime has it: its lease's, too.
            on_lost: called once, from a thread, when the registration is lost for good.
        """
        self._instance, self._seen = instance, time.monotonic()
        thread = threading.Thread(target=self._run, args=(on_lost,), name="registration", daemon=True)
        # seen by `stop`, in another thread, only once it can be joined
        thread.start()
        self._thread = thread

    def stop(self) -> None:
        """Stop, before the worker deregisters itself. Waits no longer than a second for a question that was asked."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_FAREWELL_SECONDS)

    def lost_lease(self) -> str:
        """Ask etcd what has become of the lease, after a runtime has ended by itself: a sentence, or nothing where it is still there.

        A runtime that ends in order gives its lease back, so that it is gone says something only of one that nobody has ended.
        """
        if not self._instance or missing_client():
            return ""  # it never had one, or nobody can ask
        try:
            return _FORGOTTEN if self._connected().granted(self._instance) is None else ""
        except BootstrapError as error:
            return f"etcd was away for longer than this worker's lease lives: {error.found}"

    def _connected(self) -> Etcd:
        if self._etcd is None:
            self._etcd = Etcd(etcd_endpoints(self._environ), EtcdAuth.of(self._environ), self._timeout)
        return self._etcd

    def _run(self, on_lost: Callable[[TemporaryError], object]) -> None:
        error: TemporaryError | None = None
        if missing_client():  # the world record has told so
            return
        while error is None and not self._stopped.is_set():
            error = self._look()
            if error is None:
                self._stopped.wait(self._seconds / 3)
        if error is not None and not self._stopped.is_set():
            on_lost(error)

    def _look(self) -> TemporaryError | None:
        """Look once; what is returned is the end."""
        try:
            lives = self._restore()
        except LeaseLostError:
            lives = False
        except DiscoveryError as error:
            return self._unanswered(error)
        except BootstrapError as error:
            self._refuse(error)
            lives = True
        self._seen, self._failures = time.monotonic(), 0
        return None if lives else lease_error(_FORGOTTEN)

    def _restore(self) -> bool:
        """Write again what is missing under the lease, and tell whether that lives.

        Raises:
            LeaseLostError: it has ended in the meantime.
            DiscoveryError: etcd does not answer.
            AuthorisationError: it refuses us.
        """
        etcd = self._connected()
        instance, model = (f"v1/{what}/{self._path}/{self._instance:x}" for what in ("instances", "mdc"))
        found = {
            entry.key: entry
            for key in (instance, model)
            for entry in etcd.entries(key)
            if entry.key == key and entry.lease == self._instance
        }
        missing = self._known.keys() - found.keys()
        self._known |= found
        if not missing:
            self._missing_since = 0.0
        if self._is_granted and not missing:
            return True
        seconds = etcd.granted(self._instance)
        if seconds is None:
            return False
        self._seconds, self._is_granted = seconds, True
        if missing and not self._takes_itself_out(instance in missing, model in missing) and not self._stopped.is_set():
            for key in sorted(missing):
                etcd.put(key, self._known[key].value, self._instance)
            self._log.info("somebody had deleted this worker's keys in etcd; they are written again")
        return True

    def _takes_itself_out(self, without_instance: bool, without_model: bool) -> bool:
        if not (self._pauses and without_instance):
            return False
        if not without_model:
            return True
        self._missing_since = self._missing_since or time.monotonic()
        return time.monotonic() - self._missing_since < _LEASES_TO_END * self._seconds

    def _unanswered(self, error: BootstrapError) -> TemporaryError | None:
        away = time.monotonic() - self._seen
        self._failures += 1
        # The runtime sees an etcd that has gone when its lease has run out; what it doesn't see is one that hangs. A question that was late
        # because this process stood still tells nothing of etcd.
        if away < self._seconds * 4 / 3 or self._failures < _FAILURES:
            return None
        return lease_error(
            f"etcd has not answered for {away:.0f} s, longer than this worker's lease lives ({self._seconds} s): {error.found}"
        )

    def _refuse(self, error: BootstrapError) -> None:
        if not self._refused:
            self._refused = True
            self._log.warning(f"whether this worker stays registered can't be seen: {error.found}")


def lease_error(found: str) -> TemporaryError:
    """Return the error of a worker whose lease is lost."""
    return TemporaryError(
        found,
        needed="an etcd that keeps this worker's lease",
        fix="start the worker again; if it comes back, look at etcd and the network between",
    )
