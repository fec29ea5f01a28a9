# SPDX-License-Identifier: Apache-2.0
"""Prints the status and the body of what a URL answers; 0 without an answer."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=5) as reply:  # noqa: S310 - the tests' own cluster
        print(reply.status, reply.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(0, error)
