# SPDX-License-Identifier: Apache-2.0
"""Misspelt flags and verbs come with the one that was probably meant, whichever parser reads them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from dynamo_mpi.cli.main import main
from dynamo_mpi.common.errors import UsageError
from dynamo_mpi.config.flags import DYNAMO, SWITCHES, did_you_mean
from dynamo_mpi.config.sources import WorkerSources
from dynamo_mpi.config.worker import OWN_FLAGS, load_settings, unknown_flags
from dynamo_mpi.deploy.head_node import main as head_node

_GROUPS = "common/configuration/groups"
_ARGUMENTS = ("trtllm/backend_args.py", f"{_GROUPS}/runtime_args.py", f"{_GROUPS}/frontend_decoding_args.py")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["chek"], "check"),
        (["check", "--tensor-paralel-size", "8"], "--tensor-parallel-size"),
        (["launch", "--spare-node=1", "--prefil-nodes=2"], "--prefill-nodes"),
        (["local", "--role", "aggg"], "agg"),
        (["wait", "--timout=5"], "--timeout"),
        (["doctor", "--nonsense"], ""),
    ],
)
def test_every_verb(words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 64
    verb = words[0] if len(words) > 1 else ""
    fix = f"is {meant} meant? " if meant else ""
    assert f"fix:      {fix}dynamo-mpi {verb}".rstrip() in capsys.readouterr().err


def test_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert head_node(["--run-dirr", "x"]) == 64
    assert "is --run-dir meant? " in capsys.readouterr().err


def test_other_messages_of_argparse() -> None:
    assert did_you_mean("argument --timeout: expected one argument", ["--timeout"]) == ""
    assert did_you_mean("unrecognized arguments: - x", ["--timeout"]) == ""


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--tensor-paralel-size", "--tensor-parallel-size"),
        ("--drain_timeout=5", "--drain-timeout"),
        # Dynamo would take these two for the whole flag, and our checks wouldn't
        ("--tensor-parallel", "--tensor-parallel-size"),
        ("--tp", "--tp-size"),
    ],
)
def test_a_workers_misspelt_flag_is_refused(word: str, meant: str) -> None:
    words = ["--engine", "trtllm", "--model", "/m", word, "8"]
    with pytest.raises(UsageError, match=f"unknown flag {word.partition('=')[0]}\n") as caught:
        load_settings(WorkerSources(words, {}))
    assert caught.value.fix == f"is {meant} meant?"


def test_flags_that_only_dynamo_takes_are_passed_on() -> None:
    assert unknown_flags(["--publish-kv", "--modality=text", "--no-enable-multimodal", "a", "--"]) == []


@pytest.mark.parametrize(
    ("flag", "guess"),
    [
        ("--kv-cache-block-size", ""),
        ("--dyn-kv-block-size", ""),
        ("--no-kv-block-size", "; is --kv-block-size meant?"),
        ("--no-publish-kv-evnts", "; is --no-publish-kv-events meant?"),
        ("--kv-state-endpoints", "; is --kv-state-endpoint meant?"),
        ("--frontend-encoding", "; is --frontend-decoding meant?"),
    ],
)
def test_a_flag_that_a_later_dynamo_may_have_is_a_warning(flag: str, guess: str) -> None:
    (warning,) = unknown_flags([flag, "8"])
    assert warning == f"unknown flag {flag}, which is passed on: dynamo.trtllm of Dynamo 1.4 refuses it{guess}"


def test_dynamos_flags_are_those_of_the_installed_one() -> None:
    spec = find_spec("dynamo.trtllm")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent.parent
    texts = "".join((folder / path).read_text() for path in _ARGUMENTS)
    found = set(re.findall(r'(?:flag_name|obsolete_flag)="(--[\w-]+)"', texts))
    assert len(found) > 60
    assert found - set(OWN_FLAGS) - DYNAMO == set()
    negatable = set(re.findall(r'add_negatable_bool_argument\(\s+\w+,\s+flag_name="(--[\w-]+)"', texts))
    assert negatable - set(OWN_FLAGS) == SWITCHES - {"--publish-events-and-metrics"}  # which is an alias of one
