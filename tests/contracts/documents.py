# SPDX-License-Identifier: Apache-2.0
"""The JSON that scripts read, and what stands in etcd and the run folder: the members of each, over fixed input."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.contexts import rank_context
from tests.contracts import sources
from tests.contracts.commands import fixed_environment, output_of
from tests.contracts.observed import failure_report, phases_of
from tests.contracts.shapes import members_of
from tests.unit.model_zoo import ZOO
from tests.unit.timelines import services, start_of
from tests.unit.worlds import world

FULL = world(
    instance="1a", launch="x-0", attempt=2, phase="load", phase_since=1.0, in_flight=3,
    progress=sources.RecordedProgress(1, 8, 7, "n2", 1.5, 4096), system="http://h:1", trace="00-a-b-01", probe={},
)  # fmt: skip
RECORDS = [FULL, world("agg", trtllm=None, job=None, step=None), world("decode", contract={"state_dtype": "float32"})]
FAILURE = replace(
    sources.failure_record(
        sources.WorkerIdentity.of(FULL),
        sources.Failure(3, 70, "it broke", sources.DetectedBy.DISCONNECT, "load"),
        "n2",
        "error in load",
    ),
    time=1.5e9 + 5,
)
OWN: dict[str, dict[str, Any]] = {
    "failed": {"failure": FAILURE},
    "exit": {"exit_code": 70},
    "peers": {"peers": ("a decode worker",), "news": ("peer: it has come",)},
}
WRITTEN = [
    *(("record", record.pack()) for record in RECORDS),
    ("failure", FAILURE.pack()),
    *(("event", sources.event_of(name, FULL, "serve", 2.0, **OWN.get(name, {})).pack()) for name in sources.EVENTS),
]
"""What goes to etcd and NATS, with its kind in the JSON Schema."""
_LEASE = 0x694D8F2B3C1A


def _read(kind: str) -> list[Any]:
    return [json.loads(data) for name, data in WRITTEN if name == kind]


def record() -> str:
    return f"key: {sources.record_key(FULL, _LEASE)}\n" + members_of(_read("record"), opaque=("probe", "stage"))


def last_failure() -> str:
    alone = sources.failure_record(
        sources.WorkerIdentity.of(RECORDS[1]),
        sources.Failure(-1, 75, "", sources.DetectedBy.HOST_UNREACHABLE),
        "",
        "report",
    )
    key = sources.failure_key(sources.WorkerIdentity.of(FULL), _LEASE)
    return f"key: {key}\n" + members_of([*_read("failure"), json.loads(replace(alone, time=1.5e9 + 6).pack())])


def event() -> str:
    subjects = [sources.event_of(name, FULL, "serve", 2.0).subject for name in sources.EVENTS]
    alone = sources.event_of("failed", RECORDS[1], "serve", 2.0)
    samples = [*_read("event"), json.loads(alone.pack())]
    return "".join(f"subject: {subject}\n" for subject in subjects) + members_of(samples)


def _snapshots() -> list[Any]:
    written = [
        sources.KeyValue(sources.record_key(one, _LEASE + at), one.pack(), at, _LEASE + at)
        for at, one in enumerate(RECORDS)
    ]
    worlds, _ = sources.list_workers(mock.Mock(get_prefix=lambda _: written))
    old = {"rank": -1, "time": 1.4e9, "host": "", "phase": "", "launch": None}
    key = sources.failure_key(sources.WorkerIdentity.of(FULL), _LEASE + 9)
    left = [
        sources.KeyValue(key, replace(FAILURE, **more).pack(), 1, _LEASE + 9) for more in ({"time": 1.5e9 + 7}, old)
    ]
    failures, _ = sources.list_failures(mock.Mock(get_prefix=lambda _: left))
    expected = tuple(
        sources.ExpectedWorker(f"{role}-0", role, ("n1",), 8, f"x-{role}") for role in ("prefill", "decode")
    )
    expected = (*expected, replace(expected[0], name="prefill-1", launch="x-1", given_up="no spare node is left"))
    nodes = [sources.NodeNote("n9", "used", "prefill-0"), sources.NodeNote("n2", "", "lost", 1.5e9, "prefill-0")]
    running = sources.Deployment(
        Path("/run/dir"),
        {},
        "http://h:8000",
        sources.RunningLaunch(
            expected, "12", "head.example", 4711, (), (nodes[0],), (nodes[1],), (sources.NodeNote("n4", "", "drain"),)
        ),
    )
    started = [
        sources.Service("etcd", "http://h:2379", True),
        sources.Service("nats", "nats://h:4222", False, "no answer"),
    ]
    ended = sources.Deployment(Path("/run/dir"), None, end=sources.DeploymentEnd(70, "decode-0 ended", 1.5e9 + 9))
    local = sources.Deployment(Path("/run/dir"), {}, launch=sources.RunningLaunch(expected, "", "head.example", 4711))
    return [
        sources.DeploymentStatus(1.5e9 + 60, running, tuple(worlds), tuple(failures), tuple(started), ("a warning",)),
        sources.DeploymentStatus(1.5e9 + 60, ended),
        sources.DeploymentStatus(1.5e9 + 60, local),
        sources.DeploymentStatus(1.5e9 + 60, sources.Deployment(None, {})),
    ]


def status() -> str:
    error = sources.error_as_json(sources.DynamoMpiError("found", expected="needed", fix="fix"))
    return members_of([*map(sources.status_json, _snapshots())]) + "\n# without an answer\n" + members_of([error])


def wait() -> str:
    answer = sources.Answer("Hello.", "stop", 9, 8, 0.25, 1.5)
    lack = sources.MissingItem("decode", "in load for 3 s")
    snapshot = _snapshots()[0]
    late = sources.PhaseTimeoutError("not ready", expected="n", fix="f")
    outcomes = [
        sources.WaitResult(2.5, snapshot, [], {"M": answer}),
        sources.WaitResult(2.5, snapshot, [lack], {}, late, sources.ExitCode.DEADLINE),
        sources.WaitResult(2.5, None, [lack], {}, late, sources.ExitCode.DEADLINE),
    ]
    samples = []
    for outcome in outcomes:
        out = io.StringIO()
        waited = mock.Mock(run=lambda outcome=outcome: outcome)
        with (
            mock.patch.object(sources.wait_verb, "ReadinessWaiter", lambda *_, waited=waited: waited),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(io.StringIO()),
            fixed_environment(),
        ):
            sources.dynamo_mpi_main(["wait", "--output", "json"])
        content = json.loads(out.getvalue())
        # all of what `status` has is its own contract
        content["status"] = content["status"] and {"schema": content["status"]["schema"]}
        samples.append(content)
    return members_of(samples, maps=("completions",))


CHECKED = (
    ("Llama-4-Maverick-17B-128E", "--tp-size", "8", "--gpu", "h200"),
    ("Llama-3.1-70B", "--tp-size", "4", "--pp-size", "2"),
    ("DeepSeek-R1", "--tp-size", "8", "--ep-size", "16", "--gpu", "h100"),
    ("Phi-4", "--tp-size", "8"),
    ("Llama-3.1-405B", "--tp-size", "8", "--gpu", "h100", "--trtllm-version", "1.2.1"),
    ("gpt-oss-120b", "--tp-size", "2", "--ep-size", "2", "--gpu", "b200"),
    ("Qwen3-Next-80B-A3B", "--tp-size", "2", "--role", "decode"),
)
PLANNED = (
    ("DeepSeek-R1", "--gpus", "16", "--gpu", "h200", "--role", "decode", "--trtllm-version", "1.2.1"),
    ("DeepSeek-R1", "--gpus", "8", "--gpu", "h100", "--trtllm.max_batch_size", "9999"),
    ("Llama-3.1-70B", "--gpus", "16"),
    ("Gemma-3-27B", "--gpus", "4", "--gpu", "h100"),
)


def _judged(verb: str, model: str, *words: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(ZOO[model]))
        engines = [Path(folder, f"{role}.yaml") for role in ("prefill", "decode")]
        for engine, dtype in zip(engines, ("fp8", "auto"), strict=True):
            engine.write_text(f"{{cache_transceiver_config: {{backend: UCX}}, kv_cache_config: {{dtype: {dtype}}}}}")
        named = [word.format(*engines) for word in words]
        return json.loads(output_of([verb, "--model", str(config), *named, "--output", "json"]))


def check() -> str:
    pair = _pair()
    reports = [_judged("check", model, *words) for model, *words in CHECKED]
    return members_of([*reports, pair["prefill"], pair["decode"]], examples=False)


def _pair() -> Any:
    return _judged("check", "Llama-3.1-8B", "--prefill-engine-config", "{0}", "--decode-engine-config", "{1}")


def check_pair() -> str:
    return "# prefill, decode: as `check` of one worker\n" + members_of([_pair()], opaque=("prefill", "decode"))


def plan() -> str:
    return members_of([_judged("plan", model, *words) for model, *words in PLANNED], examples=False)


def local() -> str:
    answer = sources.Answer("Hello.", "stop", 9, 8, 0.25, 1.5)
    ready = {"verdict_seconds": 0.5, "phases": {"load": 1.5}}
    samples = []
    for role, worlds in (("agg", ("agg",)), ("disagg", ("prefill", "decode"))):
        settings = sources.StackSettings(workers=tuple(sources.WorkerSpec(each, 3) for each in worlds))  # type: ignore[arg-type]
        stack = sources.Ready("M", 8000, dict.fromkeys(worlds, ready), {"ready": 2.5}, Path("/run/stack"))
        url = "http://127.0.0.1:8000"
        samples.append(sources.local_success(role, settings, stack, answer, url, {"etcd": [7]}))  # type: ignore[arg-type]
    failed = sources.local_failure(
        sources.ServiceError("it broke", part="worker", status=70, log="", fix="mend it"), 70
    )
    refused = sources.local_failure(sources.UsageError("no", fix="yes"), 64)
    maps, opaque = ("milestones", "processes", "workers"), ("worker", "workers.<key>.worker")
    return (
        members_of(samples, maps=maps, opaque=opaque)
        + "\n# worker: as in the ready file; of a run that failed:\n"
        + members_of([failed, refused])
    )


def doctor() -> str:
    checks = (sources.ok("library", "Open MPI"), sources.error("pmix", "none", "one", "install it"))
    report = sources.DoctorReport("n1", (sources.SectionReport("mpi", checks),), 1.5)
    return members_of([report.as_json()])


def hardware() -> str:
    """What the GPUs and the fabric were measured to be: ``probe`` of a record, and of `doctor --probe`."""
    gpu = sources.GpuFacts(0, "GPU-1", "NVIDIA GB200", 100, 190 << 30, 180 << 30)
    known = sources.GpuHealth(gpu, "570.86", waited=1.5, uncorrected=2, links_up=18, sm_mhz=2062, power_limit=1_200_000)
    other = known._replace(
        facts=gpu._replace(name="NVIDIA H100 NVL"), links_up=17, sm_mhz=1980, power_limit=1_000_000, pcie_generation=5
    )
    samples = [
        sources.gpu_figures(gpus) for gpus in ([known, other], [known], [sources.GpuHealth(gpu._replace(name="H200"))])
    ]
    step = sources.Step(0, "all_reduce", "tp", ((0, 1), (2, 3)), (4096, 1 << 20))
    times = [sources.Measured(step, (0, 1), size, seconds) for size, seconds in ((4096, 2e-5), (1 << 20, 1e-3))]
    answer = sources.FabricAnswer("ok", library="NCCL 2.26", network="IB", links=("P2P/CUMEM",), begin=0.5)
    fabric = sources.fabric_figures([step], times, [answer], "nccl")
    return "# gpu\n" + members_of(samples) + "\n# fabric\n" + members_of([fabric], maps=("kinds",))


def timeline() -> str:
    starts = [
        start_of(4, 2, serving=60.0),
        replace(start_of(4, 2, failed=1), job=None, step=None, name="decode-0"),
        services(),
    ]
    files = sources.pack_starts(starts)
    traced = sources.trace(starts)
    traced["dynamo_mpi"] = {"schema": traced["dynamo_mpi"]["schema"]}
    return (
        members_of([files])
        + "\n# trace for Perfetto; dynamo_mpi is the above\n"
        + members_of([traced], maps=("otherData",))
    )


def ready_file() -> str:
    samples = []
    with tempfile.TemporaryDirectory() as folder, fixed_environment(DYN_MPI_ATTEMPT="2"):
        path = Path(folder, "ready.json")
        settings = sources.load_settings(sources.WorkerSources(["--model", "/models/M", "--ready-file", str(path)], {}))
        context = rank_context(phases_of("load"), ranks=8)
        file = sources.ComparedFile("model config", "/models/M/config", "{}")
        request = sources.ReportRequest((), "/models/M", ("a.safetensors",), (file,))
        preflight = (
            request,
            sources.RankReport("n1", "", "1.0", (), sources.HostFacts(True, "Open MPI").pack(), ("580.1",)),
        )
        for system in ("http://n1:9090", None):
            sources.ReadyFile(context, settings, 1.5, system, preflight if system else None).on_ready()
            samples.append(json.loads(path.read_text()))
    return members_of(
        samples,
        maps=("phases", "node.files"),
        varying=("pid", "process_start", "host", "started", "ready_seconds", "<key>"),
    )


def failure_file() -> str:
    return members_of(failure_report().files, varying=("time",))


class _Steps:
    """The steps of a deployment that ends with its first one."""

    checks_in_services = False

    def check(self) -> sources.Command:
        return sources.Command("check", "check", (("false",),))

    def services(self) -> sources.Command:
        return sources.Command("services", "services", ())

    def worker(self, worker: sources.LaunchedWorker, services: object = ()) -> sources.Command:
        return sources.Command(worker.name, worker.name, (), {sources.LAUNCH_VARIABLE: f"x-{worker.name}"})

    def probe(self, node: str) -> sources.Command:
        return sources.Command(f"probe-{node}", f"probe-{node}", ())

    def prepare(self, node: str) -> tuple[sources.Command, ...]:
        return (sources.Command(f"spare-{node}", f"spare-{node}", ()),)


def _deployment_json(path: Path) -> Any:
    """Return what `launch` says of a deployment while its check runs."""
    engines = {"prefill_engine_config": "p.yaml", "decode_engine_config": "d.yaml"}
    settings = sources.read_launch_settings({"model": "/models/M", "launcher": "slurm", **engines}, (), {})
    worker = sources.LaunchedWorker("prefill-0", "prefill", "p.yaml", ("n1", "n2"), 8)
    run_dir = sources.RunDir(path)
    with sources.Interrupts() as interrupts, contextlib.suppress(sources.StepFailed), fixed_environment():
        steps: Any = _Steps()
        endings = sources.MpirunStepController()
        context = sources.LaunchContext(run_dir, interrupts, lambda text: None)
        placement = sources.Placement((worker,), ("n3",), "n1")
        controller = sources.DeploymentController(settings, placement, steps, endings, context)
        controller.run()
    content = json.loads((path / "deployment.json").read_text(encoding="utf-8"))
    run_dir.write_end(70, "decode-0 ended with exit code 70")
    run_dir.close()
    return content


def run_folder() -> str:
    """What `launch` and the head node leave in the folder of a deployment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        deployment = _deployment_json(path)
        ended = json.loads((path / "ended.json").read_text(encoding="utf-8"))
    environment = {"ETCD_ENDPOINTS": "https://h:2379"}
    running = [sources.services_json("http://h:8000", "12", environment), sources.services_json(None, None, {})]
    return (
        "# deployment.json\n"
        + members_of([deployment], varying=("pid", "host"))
        + "\n# ended.json\n"
        + members_of([ended], varying=("time",))
        + "\n# services.json\n"
        + members_of(running, maps=("environment",), varying=("pid", "host"))
    )


def health() -> str:
    """What the probes of a node get."""
    state = sources.HealthState(3, "n1", 7, 1000.5, 10.0, attempt=2, phase="load", since=1002.0, last_seen=40.0)
    facts = {"role": "agg", "engine": "trtllm", "model": "M", "namespace": "dynamo", "component": "backend"}
    known = state._replace(facts=tuple({**facts, "endpoint": "dyn://a.b.c", "trace": "00-a-b-01"}.items()))
    serving = known._replace(phase="serve", world="serve", rank=0, runtime=9)
    endpoints = {"endpoints": {"dyn://a.b.c": "ready"}}
    answers = {
        "/live starting": sources.live(state, 41.0),
        "/live ending": sources.live(serving._replace(ending="error in load"), 41.0),
        "/live silent": sources.live(known, 1e6),
        "/health loading": sources.health(known._replace(progress="3 of 4"), 41.0),
        "/health serving": sources.health(serving, 41.25, (200, endpoints)),
        "/health runtime not ready": sources.health(serving, 41.25, (503, endpoints)),
        "/health runtime silent": sources.health(serving, 41.25, (0, {})),
    }
    codes = "".join(f"{name}: {answer.status} {answer.body['status']}\n" for name, answer in answers.items())
    return codes + "\n" + members_of([answer.body for answer in answers.values()], maps=("endpoints",))


CONTRACTS: dict[str, Callable[[], str]] = {
    "json/record": record,
    "json/failure-record": last_failure,
    "json/event": event,
    "json/status": status,
    "json/wait": wait,
    "json/check": check,
    "json/check-pair": check_pair,
    "json/plan": plan,
    "json/local": local,
    "json/doctor": doctor,
    "json/hardware": hardware,
    "json/timeline": timeline,
    "json/ready-file": ready_file,
    "json/failure-file": failure_file,
    "json/run-folder": run_folder,
    "json/health": health,
}
