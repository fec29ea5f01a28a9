# SPDX-License-Identifier: Apache-2.0
"""Errors and exit codes, which batch scripts rely on."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess

import pytest

from dynamo_mpi.common import errors
from dynamo_mpi.common.errors import DynamoMpiError, ExitCode, of_signal

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, DynamoMpiError) and kind is not DynamoMpiError
]


def test_a_codes_byte_survives_a_broadcast() -> None:
    assert all(bytes([code])[0] == code for code in ExitCode)


def test_every_code_but_ok_has_an_error() -> None:
    assert {kind.exit_code for kind in KINDS} == set(ExitCode) - {ExitCode.OK}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[DynamoMpiError]) -> None:
    error = kind("found", expected="needed", fix="fix")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is kind
    assert (again.problem, again.expected, again.fix, again.exit_code) == ("found", "needed", "fix", kind.exit_code)


def test_an_error_says_what_was_found_what_is_needed_and_what_to_do() -> None:
    assert str(DynamoMpiError("f", expected="n", fix="x")).split() == ["f", "expected:", "n", "fix:", "x"]
    assert str(DynamoMpiError("f")) == "f"
    assert "needed" not in str(DynamoMpiError("f", fix="x"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signals_code_is_the_shells(number: signal.Signals) -> None:
    done = subprocess.run(["sh", "-c", f"sh -c 'kill -{int(number)} $$'; exit $?"], env=dict(os.environ))
    assert of_signal(number) == done.returncode
