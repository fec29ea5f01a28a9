# SPDX-License-Identifier: Apache-2.0
"""All worlds that etcd knows of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_mpi.control_plane.record import Posted, WorldRecord, worlds_of

if TYPE_CHECKING:
    from dynamo_mpi.control_plane.etcd import Etcd


def read_worlds(etcd: Etcd, namespace: str = "") -> tuple[list[Posted], dict[str, str]]:
    """Read the records of a namespace, or of all of them.

    Returns:
        The records, and by key what is wrong with those that can't be read: somebody else's, or a newer version's.

    Raises:
        DiscoveryError: etcd does not answer.
        AuthorisationError: it refuses us.
    """
    worlds, unread = [], {}
    for entry in etcd.entries(worlds_of(namespace)):
        try:
            worlds.append(Posted(entry.key, entry.create_revision, WorldRecord.unpack(entry.value)))
        except ValueError as error:
            unread[entry.key] = str(error)
    return worlds, unread
