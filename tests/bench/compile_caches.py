# SPDX-License-Identifier: Apache-2.0
"""Compile caches with real compilers on a real GPU: ``python -m tests.bench.compile_caches``; needs a GPU, torch and triton, no MPI.

Each start is what a rank does (`CacheSession`), with a world of one rank, and its kernels are compiled by a fresh process: Triton kernels, a
network under torch.compile, PTX by the driver, an extension of torch, and, where it is installed, a module of FlashInfer. Measured: cold;
seeded; seeded in another folder; with another key; two workers at once; and which of the variables the libraries honour.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from dynamo_mpi.checks.gpu_facts import read_gpus
from dynamo_mpi.checks.host_facts import HostFacts, collect
from dynamo_mpi.checks.rank_facts import RankFacts
from dynamo_mpi.checks.rank_report import ComparedFile
from dynamo_mpi.layout.engine_config import EngineConfig
from dynamo_mpi.layout.layout import Cluster, LayoutSpec
from dynamo_mpi.layout.model_config import parse_model_shape
from dynamo_mpi.mpi.world import World
from dynamo_mpi.stage.cache_archive import contents_of
from dynamo_mpi.stage.cache_call import HelperCall
from dynamo_mpi.stage.cache_key import key_of
from dynamo_mpi.stage.cache_session import CachePlan, CacheSession
from dynamo_mpi.stage.cache_store import Part, folders_of, name_of
from dynamo_mpi.stage.compile_caches import LIBRARIES, assign
from tests.contexts import OneRank

UNAVAILABLE = 69
PARTS = ("triton", "inductor", "cuda", "extension", "flashinfer")
_CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    }
)


# the process that compiles


def _torch() -> Any:
    return import_module("torch")


def compile_triton() -> None:
    import_module("tests.bench.triton_kernels").launch_all(_torch())


def compile_inductor() -> None:
    torch = _torch()
    module: Any = torch.nn.Module

    class Block(module):  # type: ignore[misc]  # torch isn't installed where types are checked
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(width)
            self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))).softmax(-1)

    for width in (256, 512, 1024):
        block = torch.compile(Block(width).cuda(), dynamic=False)
        block(torch.randn(64, width, device="cuda")).sum().item()


def compile_cuda() -> None:
    """Have the driver compile PTX, as for kernels that a library has for no GPU of this kind."""
    lines = "\n".join(f"fma.rn.f32 %f1, %f1, %f2, 0f3F8{number % 0xFFFF:05X};" for number in range(20_000))
    ptx = f"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry kernel(.param .u64 out) {{
.reg .f32 %f<3>; .reg .b64 %r<3>;
ld.param.u64 %r1, [out]; cvta.to.global.u64 %r2, %r1;
ld.global.f32 %f1, [%r2]; mov.f32 %f2, %f1;
{lines}
st.global.f32 [%r2], %f1; ret; }}"""
    driver = ctypes.CDLL("libcuda.so.1")
    module = ctypes.c_void_p()
    if code := driver.cuModuleLoadData(ctypes.byref(module), ptx.encode()):
        raise RuntimeError(f"cuModuleLoadData: error {code}")


def compile_extension() -> None:
    import_module("torch.utils.cpp_extension").load_inline(
        "bench_extension", "int three() { return 3; }", functions=["three"]
    )


def compile_flashinfer() -> None:
    flashinfer, torch = import_module("flashinfer"), _torch()
    flashinfer.silu_and_mul(torch.randn(8, 256, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


def work(parts: Sequence[str]) -> None:
    """Compile, and print the seconds of each part, without imports and the start of CUDA."""
    _torch().zeros(1, device="cuda").item()
    seconds: dict[str, Any] = {}
    for part in parts:
        began = time.monotonic()
        try:
            cast("Callable[[], None]", globals()[f"compile_{part}"])()
        except Exception as error:  # any: the others are worth a figure still
            seconds[part] = f"{type(error).__name__}: {error}"[:300]
        else:
            seconds[part] = round(time.monotonic() - began, 2)
    print(json.dumps(seconds))


# a rank's start


def start(base: Path, shared: Path, key: dict[str, Any], parts: Sequence[str], home: Path) -> dict[str, Any]:
    """Start once; return what it took."""
    name = name_of("bench", key)
    folders = folders_of(str(shared), name)
    environ = dict(os.environ) | {"HOME": str(home), "TMPDIR": str(home)}
    began = time.monotonic()
    found = HelperCall({"do": "look", "folders": folders, "key": key, "ranks": 1, "worker": "w"}, environ).result(30.0)
    plan = CachePlan(
        name, (str(base),), found.get("folder", ""), tuple(Part(*each) for each in found.get("parts", ())), folders[0]
    )
    session = CacheSession(0, plan, environ, lambda _: None)
    session.begin()
    seeding = session.finish(cast("World", OneRank()))
    if seeding is None:
        raise RuntimeError("no seeding on rank 0")
    seed_seconds = time.monotonic() - began
    command = [sys.executable, "-m", "tests.bench.compile_caches", "--work", ",".join(parts)]
    child = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = {
        "seeded": seeding.seeded,
        "problems": [each.problem for each in seeding.problems],
        "seed_seconds": round(seed_seconds, 2),
        "seconds": json.loads(child.stdout.splitlines()[-1]),
        "folder": environ["TRITON_CACHE_DIR"].removesuffix("/triton"),
    }
    result["files"] = {
        library.name: sum(1 for path in Path(environ[library.variable]).rglob("*") if path.is_file())
        for library in LIBRARIES
        if os.path.isdir(environ[library.variable])
    }
    if session.writes:
        began = time.monotonic()
        saved = session.save()
        if saved.get("new"):
            request = {"do": "publish", "target": plan.target, "key": key, "parts": [saved["part"]]}
            saved |= HelperCall(request, environ).result(30.0)
        result |= {"saved": saved, "save_seconds": round(time.monotonic() - began, 2)}
    session.remove()
    return result


def key_for(config: EngineConfig, ranks: int) -> dict[str, Any]:
    """Return the key that a worker would have on this machine's first GPU."""
    subject = LayoutSpec(parse_model_shape(_CONFIG, "config.json"), config, Cluster(1, ranks))
    gpus, facts = read_gpus(os.environ), HostFacts.unpack(collect("no MPI", os.environ, speaks_for_node=True).pack())
    rows = [RankFacts(rank, "bench", facts, gpus) for rank in range(ranks)]
    return key_of(subject, (ComparedFile("model config", "config.json", _CONFIG),), rows, without_gpus=False)


def at_once(count: int, run: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def moved(root: Path, part: str) -> dict[str, Any]:
    """Compile, move the folder, and start again: what a library makes of files that are elsewhere now, without our help."""
    answer: dict[str, Any] = {"start": f"moved: {part}"}
    for name in ("before", "moved", "moved, again"):
        folder = root / ("before" if name == "before" else "after")
        if name == "moved":
            (root / "before").rename(folder)
        folder.mkdir(exist_ok=True)
        environ = dict(os.environ) | assign(str(folder), {}).variables | {"HOME": str(root), "TMPDIR": str(root)}
        before = contents_of(str(folder))
        command = [sys.executable, "-m", "tests.bench.compile_caches", "--work", part]
        child = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
        answer[name] = json.loads(child.stdout.splitlines()[-1])[part]
        answer[f"{name}: new files"] = contents_of(str(folder)).new_beside(before)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to compile")
    options = parser.parse_args()
    if options.work:
        work(options.work.split(","))
        return 0
    if not read_gpus(os.environ).gpus:
        print(f"this bench needs a GPU: {read_gpus(os.environ).problem or 'NVML shows none'}", file=sys.stderr)
        return UNAVAILABLE
    parts = options.parts.split(",")
    with contextlib.suppress(ImportError):
        torch, triton = _torch(), import_module("triton")
        print(f"torch {torch.__version__}, triton {triton.__version__}, {torch.cuda.get_device_name()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="caches-") as folder:
        root = Path(folder)
        homes = iter(range(1000))

        def run(base: str, key: dict[str, Any], chosen: Sequence[str] = parts) -> dict[str, Any]:
            home = root / f"home{next(homes)}"
            for each in (root / base, home):
                each.mkdir(exist_ok=True, mode=0o700)
            result = start(root / base, root / "shared", key, chosen, home)
            left = sorted({str(path.relative_to(home)).split("/")[0] for path in home.rglob("*") if path.is_file()})
            return result | {"written elsewhere": left}

        def show(what: str, result: dict[str, Any]) -> None:
            print(json.dumps({"start": what} | result), flush=True)

        usual, other = key_for(EngineConfig(), 1), key_for(EngineConfig(tp_size=2), 2)
        show("cold", run("a", usual))
        show("seeded, same folder", run("a", usual))
        show("seeded, another folder", run("b", usual))
        # the one before has written back what it had to compile again
        show("seeded, the first folder again", run("a", usual))
        show("another layout", run("a", other | {"places": other["places"][:1]}, ["triton"]))
        for number, result in enumerate(
            at_once(2, lambda: run("a", usual, [each for each in parts if each != "extension"]))
        ):
            show(f"two workers at once, {number}", result)
        cold = key_for(EngineConfig(max_batch_size=7), 1) | {"role": "decode"}
        for number, result in enumerate(at_once(2, lambda: run("a", cold, ["triton", "inductor"]))):
            show(f"two cold workers at once, {number}", result)
        for part in parts:
            (root / f"m-{part}").mkdir()
            print(json.dumps(moved(root / f"m-{part}", part)), flush=True)
        left = [str(path) for base in ("a", "b") for path in (root / base).iterdir()]
        print(json.dumps({"left behind": left}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
