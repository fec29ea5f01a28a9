# SPDX-License-Identifier: Apache-2.0
"""Users of a test's own etcd."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from pyetcd import etcdrpc

PASSWORDS = {"root": "hunter2", "worker": "s3cret", "guest": "s3cret"}


def add_users(url: str, prefixes: Sequence[str]) -> None:
    """Have etcd ask who somebody is: ``root`` may do all, ``worker`` read and write under ``prefixes``, ``guest`` nothing."""
    with grpc.insecure_channel(url.removeprefix("http://")) as channel:
        auth = etcdrpc.AuthStub(channel)
        auth.RoleAdd(etcdrpc.AuthRoleAddRequest(name="worlds"))
        for prefix in prefixes:
            start = prefix.encode()
            permission = etcdrpc.Permission(
                permType=etcdrpc.Permission.READWRITE, key=start, range_end=start[:-1] + bytes([start[-1] + 1])
            )
            auth.RoleGrantPermission(etcdrpc.AuthRoleGrantPermissionRequest(name="worlds", perm=permission))
        for name, word in PASSWORDS.items():
            auth.UserAdd(etcdrpc.AuthUserAddRequest(name=name, password=word))
        auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="root", role="root"))
        auth.UserGrantRole(etcdrpc.AuthUserGrantRoleRequest(user="worker", role="worlds"))
        auth.AuthEnable(etcdrpc.AuthEnableRequest())
