# SPDX-License-Identifier: Apache-2.0
"""`--dry-run` prints the exact commands: golden files, and a shell that reads them back."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.model_zoo import ZOO

from .dry_runs import CASES, GOLDEN, HERE, LLAMA, ROOT, STANDINS, Case, dry_run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prints_what_the_golden_file_has(case: Case) -> None:
    # `python -m tests.scripts.dry_runs` writes them anew
    assert dry_run(case) == (GOLDEN / f"{case.name}.txt").read_text()


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {case.name for case in CASES}


def test_what_is_printed_can_be_typed() -> None:
    """A shell that runs the printed text hands the same words to srun as we would."""
    case = Case(
        "strange",
        "srun_disaggregated.sh",
        ("--", "--trtllm.x", "$(touch a) 'b'"),
        {**LLAMA, "SERVED_MODEL_NAME": 'it"s $(touch c) `d` \\', "IMAGE": "a b#c&d"},
    )
    script = 'srun() { printf \'<%s>\' "$SERVED_MODEL_NAME" "$@"; echo; }\n' + dry_run(case)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    workers = [line for line in done.stdout.splitlines() if "start_worker" in line]
    assert len(workers) == 2
    for line in workers:
        assert line.startswith('<it"s $(touch c) `d` \\>')
        assert "<--container-image=a b#c&d>" in line
        assert line.endswith("<--trtllm.x><$(touch a) 'b'>")


def test_a_launcher_needs_nothing_but_python() -> None:
    """The host of a cluster has Slurm and a Python, and not what is in the container."""
    words = [sys.executable, "-S", "-m", "dynamo_mpi", "launch", "--dry-run", "--skip-check"]
    environment = {**LLAMA, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("srun") == 4


@pytest.mark.parametrize(
    ("words", "environment", "needle"),
    [
        ((), {"NUM_PREFILL_NODES": "3"}, "takes 5 nodes, and job 1234 has 4 (n1, n2, n3, n4)"),
        ((), {"NUM_DECODE_NODES": "none"}, "environment NUM_DECODE_NODES is 'none'"),
        ((), {"MODEL_PATH": ""}, "no model was given"),
        ((), {"SLURM_JOB_ID": ""}, "salloc --nodes=4 --exclusive --gpus-per-node=4 --partition=big"),
        (("--prefill-nodes", "2"), {"SLURM_JOB_NODELIST": "x[1-4]"}, "the nodes of job 1234 are unknown"),
        (
            ("--spare-nodes", "1"),
            {"SLURM_JOB_ID": ""},
            "salloc --nodes=5 --exclusive --gpus-per-node=4 --partition=big --no-kill,",
        ),
        (("--spare-nodes=-1",), {}, "0, or a positive whole number"),
        (("--launcher", "slurm", "--hostfile", "/h"), {}, "a hostfile is given, /h, and the launcher is slurm"),
        (("--launcher", "slurm"), {"HOSTFILE": "/h"}, "unset HOSTFILE"),
        (("--hostfile", str(HERE / "hostfile")), {}, "fix:      more hosts in the file"),
        (("--hostfile", "/nowhere"), {}, "the hostfile /nowhere can't be read"),
        (("--launcher", "mpirun"), {}, "mpirun needs to know the hosts"),
        (("--hostfile", "x"), {"IMAGE": "y"}, "a container image was given for mpirun"),
        ((), {"SRUN_ARGS": "'open"}, "words as a shell reads them"),
        (("--run-dir", "/a,b", "--prefill-nodes=2", "--decode-nodes=2"), {"IMAGE": "y"}, "Pyxis reads commas"),
        (("--nonsense",), {}, "unrecognized arguments: --nonsense"),
        (("--", "--tensor-paralel-size=8"), {}, "would be refused: unknown flag --tensor-paralel-size"),
        (("--dry-run", "--nodes", "n[1-4"), {}, "--nodes is 'n[1-4': a [ isn't closed"),
        (("--dry-run", "--nodes", "n[1-3]"), {}, "takes 4 nodes, and --nodes has 3 (n1, n2, n3)"),
        (("--nodes", "n[3-6]"), {}, "--nodes is 'n[3-6]', and job 1234 does not have n5, n6"),
        (("--nodes", "2x"), {}, "--nodes is '2x', and job 1234 does not have 2x"),
        (("--nodes=-1",), {}, "--nodes is '-1'"),
        (("--dry-run", "--nodes", "1.5"), {}, "--nodes is '1.5'"),
        (("--nodes", "n1", "--hostfile", "x"), {}, "--nodes lists nodes (n1), and the hostfile x does, too"),
        (
            ("--dry-run", "--", "--cpu-bind", "bad"),
            {},
            "each prefill worker would be refused: flag --cpu-bind is 'bad'",
        ),
        (("--dry-run", "--", "--role", "decode"), {}, "--role is 'decode' behind --"),
        (("--dry-run", "--", "--spare-nodes=1"), {}, "--spare-nodes is a flag of launch, and is behind --"),
        (("--", "--drain-timeout=x"), {}, "flag --drain-timeout is 'x'"),
        (("--", "--trtllm.max_batch_size"), {}, "--trtllm.max_batch_size has no value"),
        (("--", "stray"), {"IMAGE": "a"}, "'stray' belongs to no flag"),
        (("--engine", "reference", "--", "--publish-events"), {}, "Unrecognized arguments: --publish-events"),
        (("--dry-run",), {"DYN_MPI_CPU_BIND": "bad"}, "environment DYN_MPI_CPU_BIND is 'bad'"),
        (("--dry-run",), {"SLURM_JOB_NODELIST": "n[1-"}, "SLURM_JOB_NODELIST is 'n[1-': a [ isn't closed"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(
    words: tuple[str, ...], environment: dict[str, str], needle: str
) -> None:
    variables = {"PATH": f"{STANDINS}:{os.environ['PATH']}", "PYTHON": sys.executable, "MODEL_PATH": "/m"}
    variables |= {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "n[1-4]", "PARTITION": "big", **environment}
    script = str(ROOT / "scripts" / "srun_disaggregated.sh")
    done = subprocess.run([script, *words], env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (65 if "/nowhere" in words else 64, "")
    assert needle in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("s[rbt]*.sh")))
def test_help_names_the_variables(script: str) -> None:
    """Every variable that a script reads is in its --help."""
    path = ROOT / "scripts" / script
    done = subprocess.run(
        [str(path), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
    )
    text = path.read_text()
    sourced = re.findall(r"^source .*/(\w+\.sh)\"$", text, re.MULTILINE)
    text += "".join((path.parent / name).read_text() for name in sourced)
    assert sourced == ["deployment.sh"] * script.startswith("srun")
    read = set(re.findall(r"^ *export ([A-Z_]+)=", text, re.MULTILINE)) - {
        "PYTHONPATH",
        "DYN_MPI_CHECKOUT",
        "DYN_MPI_NO_KILL",
    }
    assert shlex.split(done.stdout, comments=False, posix=False)
    assert read <= set(re.findall(r"[A-Z_]+", done.stdout)), done.stdout
    # Pyxis takes nothing else for a file
    assert all(image.startswith("/") for image in re.findall(r"IMAGE=(\S+\.sqsh)", done.stdout))


def refused_run(*words: str, **environment: str) -> tuple[int, str, str]:
    """Do a dry run of four nodes; return its code, stdout and stderr."""
    command = [str(ROOT / "scripts" / "srun_disaggregated.sh"), "--dry-run", "--nodes", "n[1-4]", *words]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "MODEL_PATH": "/models/M", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 65, "prefill.yaml can't be read: No such file or directory"),
        ("tensor_parallel_size: [", 65, "prefill.yaml"),
        ("- 1", 65, "prefill.yaml"),
        ("tensor_parallel_size: eight", 65, "tensor_parallel_size"),
        ("tensor_parallel_size: 8", 0, ""),
    ],
)
def test_an_engine_config_that_a_deployment_would_refuse(
    image: bool, content: str | None, code: int, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "prefill.yaml").write_text(content)
    folder = "/configs" if image else str(tmp_path)
    setting = {"IMAGE": "a#b", "MOUNTS": f"{tmp_path}:/configs,{ROOT}:/mnt"} if image else {}
    done, out, error = refused_run(**setting, PREFILL_ENGINE_CONFIG=f"{folder}/prefill.yaml")
    assert done == code, error
    assert words in error
    assert bool(out) == (code == 0)


def test_a_layout_that_a_deployment_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ZOO["Llama-3.1-8B"]))
    for role, size in (("prefill", 8), ("decode", 8)):
        (tmp_path / f"{role}.yaml").write_text(
            f"tensor_parallel_size: {size}\ncache_transceiver_config: {{backend: UCX}}\n"
        )
    configs = {f"{role.upper()}_ENGINE_CONFIG": str(tmp_path / f"{role}.yaml") for role in ("prefill", "decode")}
    assert refused_run(MODEL_PATH=str(tmp_path), **configs)[0] == 0
    (tmp_path / "decode.yaml").write_text("tensor_parallel_size: 7\ncache_transceiver_config: {backend: UCX}\n")
    code, out, error = refused_run(MODEL_PATH=str(tmp_path), **configs)
    assert (code, out) == (78, "")
    assert "the deployment would be refused" in error and "error B1" in error
    # the deployment's own check is left out too
    assert refused_run("--skip-check", MODEL_PATH=str(tmp_path), **configs)[0] == 0


def test_what_is_in_an_image_alone_is_not_judged() -> None:
    setting = {"IMAGE": "a#b", "MOUNTS": "/nowhere/at/all:/configs", "PREFILL_ENGINE_CONFIG": "/configs/p.yaml"}
    assert refused_run(**setting, DECODE_ENGINE_CONFIG="/in/the/image.yaml")[0] == 0


def test_an_empty_list_of_nodes() -> None:
    code, _, error = refused_run("--nodes", "")
    assert code == 64
    assert "--nodes is ''" in error and "'n[1-4]'" in error and "is set" in error


@pytest.mark.parametrize("launcher", [(), ("--hostfile", str(HERE / "hostfile"))])
def test_a_misspelt_variable_is_named_once_and_passed_on_to_no_step(launcher: tuple[str, ...]) -> None:
    words = [sys.executable, "-m", "dynamo_mpi", "launch", "--dry-run", "--gpus-per-node=1", *launcher]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **LLAMA, "NUM_DECODE_NODES": "1"}
    variables |= {
        "NUM_PREFILL_NODES": "1",
        "DYN_MPI_STAGEE": "/x",
        "DYN_MPI_LOG_DIR": "/logs",
        "DYN_MPI_SKIP_CHECK": "1",
    }
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    warning = "unknown variable DYN_MPI_STAGEE, which is ignored: is DYN_MPI_STAGE meant?"
    assert done.stderr == f"dynamo-mpi launch: warning: {warning}\n"
    assert "STAGEE" not in done.stdout
    assert ("-x DYN_MPI_LOG_DIR" in done.stdout) == bool(launcher)


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        ("engine: reference", ("--kv-events",), 64),
        ("engine: trtllm", ("--kv-events",), 0),
        ("engine: trtllm", ("--cpu-bind", "bad"), 64),
        ("egine: trtllm", (), 65),
        # where it isn't here, it may say anything
        (None, ("--kv-events",), 0),
    ],
)
def test_the_workers_settings_file_counts(
    content: str | None, words: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    config, file = tmp_path / "agg.yaml", tmp_path / "settings.yaml"
    config.write_text("tensor_parallel_size: 8")
    if content is not None:
        file.write_text(content)
    agg = ("--role", "agg", "--engine-config", str(config), "--", "--settings", str(file), *words)
    done, _, error = refused_run(*agg)
    assert done == code, error
    # in an image it is looked for where it is mounted from
    inside = tuple(word.replace(str(tmp_path), "/in") for word in agg)
    done, _, error = refused_run(*inside, IMAGE="a#b", MOUNTS=f"{tmp_path}:/in")
    assert done == code, error


@pytest.mark.parametrize(("image", "code"), [("", 64), ("a#b", 0)])
def test_flags_of_an_engine_that_may_be_in_the_image(image: str, code: int, tmp_path: Path) -> None:
    config = tmp_path / "agg.yaml"
    config.write_text("tensor_parallel_size: 8")
    words = ("--role", "agg", "--engine-config", str(config), "--", "--kv-events")
    done, _, error = refused_run(*words, IMAGE=image, MOUNTS=f"{tmp_path}:{tmp_path}")
    assert done == code, error
    assert ("Unrecognized arguments: --kv-events" in error) == (code == 64)


def test_a_misspelt_variable_of_the_scripts_is_named() -> None:
    code, _, error = refused_run(NUM_SPARE_NODE="1", PREFILL_ENGINE_CONFIG="/c.yaml", IMAGE="a#b")
    assert (code, error) == (
        0,
        "dynamo-mpi launch: warning: unknown variable NUM_SPARE_NODE, which is ignored: is NUM_SPARE_NODES meant?\n",
    )
    variables = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "NUM_SPARE_NODE": "1"}
    words = [str(ROOT / "scripts" / "sbatch_disaggregated.sh"), "--dry-run"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    assert "warning: unknown variable NUM_SPARE_NODE, which is ignored: is NUM_SPARE_NODES meant?\n" in done.stderr
    # the job can be submitted where no such Python is
    done = subprocess.run(words, env=variables | {"PYTHON": "/nowhere"}, capture_output=True, text=True, check=True)
    assert done.stderr == ""


IMAGE = {"IMAGE": "a#b", "PREFILL_ENGINE_CONFIG": "/in/p.yaml", "DECODE_ENGINE_CONFIG": "/in/d.yaml"}
JOB_OF_FOUR = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({**IMAGE, "MOUNTS": "lustre:/lustre"}, "Pyxis doesn't take 'lustre:/lustre' for a mount"),
        ({**IMAGE, "SRUN_ARGS": "--container-mounts=/a:b"}, "Pyxis doesn't take '/a:b' for a mount"),
        ({**IMAGE, "CACHE_DIR": "{}/file"}, "--cache-dir (CACHE_DIR) is {}/file: no folder"),
        ({**IMAGE, "STAGE_DIR": "{}/file"}, "--stage-dir (STAGE_DIR) is {}/file: no folder"),
        ({**IMAGE, **JOB_OF_FOUR, "CACHE_DIR": "{}/none"}, "--cache-dir (CACHE_DIR) is {}/none, which isn't there"),
        ({**IMAGE, "CACHE_DIR": "{}/none", "STAGE_DIR": "{}/none"}, ""),
        ({**IMAGE, **JOB_OF_FOUR, "STAGE_DIR": "{}/none", "CACHE_DIR": "/nowhere/at/all"}, ""),
        ({**IMAGE, "DYN_MPI_RUN_DIR": "{}/file"}, "the run folder {}/file can't be used: Not a directory"),
        ({**IMAGE, "DYN_MPI_RUN_DIR": "{}/taken"}, "and that no deployment has left: stop"),
        ({**IMAGE, "DYN_MPI_RUN_DIR": "{}"}, ""),
        ({**IMAGE, "DYN_MPI_RUN_DIR": "{}/new/run"}, ""),
    ],
)
def test_folders_and_mounts_that_a_deployment_would_refuse(setting: dict[str, str], words: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir(mode=0o700)
    (tmp_path / "taken" / "stop").touch()
    code, out, error = refused_run(**{name: value.replace("{}", str(tmp_path)) for name, value in setting.items()})
    assert (code, bool(out)) == ((64, False) if words else (0, True)), error
    assert words.replace("{}", str(tmp_path)) in error
    assert not words or ("expected:" in error and "fix:" in error)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "stop", "taken"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_run_folder(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    code, out, error = refused_run(DYN_MPI_RUN_DIR=str(tmp_path))
    assert (code, out, "belongs to user 65534" in error) == (77, "", True)
