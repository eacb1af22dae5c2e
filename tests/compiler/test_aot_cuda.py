"""Artifacts for CUDA devices, made and loaded on a machine that has none; launches go to a stand-in for libcuda."""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from click.testing import CliRunner, Result
from plait.codegen.backends import BACKENDS
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.target import Target
from plait.codegen.triton import build
from plait.compiler.aot import device_graphs
from plait.compiler.cli import main
from plait.compiler.options import Options
from plait.compiler.plans import target_of
from plait.compiler.source import Targets
from plait.errors import CannotRetarget, DamagedArtifact, DeviceNotAvailable, FallbackRefused, NoSuchPart
from plait.ir import parse_graph
from plait.runtime import artifact as artifacts
from plait.runtime import binaries, cuda, devices
from plait.runtime.archive import Archive
from plait.runtime.check import check
from plait.runtime.plan import Launch, Plan, from_json

from tests import cuda_models
from tests.codegen.cuda_plan import on_cpu
from tests.compiler.small import ready
from tests.runtime.kit import edit_manifest

CPU = "x86-64-v3"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer block for one CPU target and two CUDA targets."""
    path = tmp_path_factory.mktemp("cuda") / "block.plait"
    plait.compile(*cuda_models.block()).save(path, targets=Targets(isas=(CPU,), cuda=(80, 90)))
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`gpu(major, minor)` makes torch say that there are two such CUDA devices."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return pretend


def plan_for(artifact: Path, target: str) -> Plan:
    opened = Archive(artifact)
    return from_json(opened.json(artifacts.plan_members(opened.manifest)[target]))


# -- what is in the file ------------------------------------------------------------------------------------------------


def test_the_artifact_runs_on_the_cpu_as_ever(artifact: Path) -> None:
    model, inputs = cuda_models.block()
    loaded = plait.load(artifact)
    assert (loaded.target, loaded.device) == ("cpu", torch.device("cpu"))
    torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


def test_it_holds_a_plan_and_cubins_for_each_target(artifact: Path) -> None:
    opened = Archive(artifact)
    members = artifacts.plan_members(opened.manifest)
    assert members == {"cpu": "plan.json", "cuda:80": "plans/cuda-80.json", "cuda:90": "plans/cuda-90.json"}
    for sm in (80, 90):
        plan = plan_for(artifact, f"cuda:{sm}")
        check(plan)
        names = binaries.kernel_names(plan, "triton")
        assert names and not binaries.kernel_names(plan, "cpp")
        cubins = [n for n in opened.names if n.startswith(f"kernels/bin/cuda-{sm}/") and n.endswith(".bin")]
        assert {n.rsplit("/", 1)[1].rsplit("-", 1)[0] for n in cubins} == set(names)
        assert {cuda_models.compute_capability(bytes(opened.view(n))) for n in cubins} == {sm}
        assert all(f"kernels/src/{name}.py" in opened.names for name in names)
    assert "@cuda:0" in opened.text("graphs/tensor-cuda.txt") and "@cuda" not in opened.text("graphs/tensor.txt")


def test_weights_are_stored_once_for_all_plans(artifact: Path) -> None:
    opened = Archive(artifact)
    weights = artifacts.load_weights(opened, plan_for(artifact, "cpu"))
    assert len(opened.view("weights.safetensors")) < 1.1 * sum(t.nbytes for t in weights.values())


def test_equal_models_give_equal_files(artifact: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.plait"
    plait.compile(*cuda_models.block()).save(again, targets=f"cpu:{CPU},cuda:80,cuda:90")
    assert again.read_bytes() == artifact.read_bytes()


def command(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


def test_the_command_line_makes_and_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlp_factory.py").write_text("from tests.cuda_models import mlp as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = command("compile", "mlp_factory:make", "-o", "m.plait", "--target", f"cpu:{CPU},cuda:80", "--json")
    assert made.exit_code == 0, made.stderr
    found = json.loads(made.stdout)["device_coverage"]["cuda:80"]
    assert found["launches"] >= 2 and found["fallback"] == 0
    summary = json.loads(command("inspect", "m.plait", "--json").stdout)
    assert summary["targets"] == [CPU, "cuda:80"] and summary["device_plans"]["cuda:80"]["kernels"] >= 2
    assert "tensor-cuda" in summary["graphs"]
    assert "launch" in command("inspect", "m.plait", "--graph", "plan", "--target", "cuda:80").stdout
    assert "cuBLAS" in command("inspect", "m.plait", "--coverage", "--target", "cuda:80").stdout
    assert "tl.load" in command("inspect", "m.plait", "--kernels").stdout
    unknown = command("inspect", "m.plait", "--coverage", "--target", "cuda:75")
    assert unknown.exit_code == 2 and NoSuchPart.code in unknown.stderr
    refused = command("run", "m.plait", "--random", "--device", "cuda")
    assert refused.exit_code == 4 and DeviceNotAvailable.code in refused.stderr
    assert command("run", "m.plait", "--random", "--device", "cpu", "--compare", "graph").exit_code == 0


def test_a_dry_run_says_what_runs_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "block_factory.py").write_text("from tests.cuda_models import block as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = command("compile", "block_factory:make", "--target", "cpu,cuda:90", "--dry-run").stdout
    assert "cuda:90: " in text and "cuBLAS's matmul" in text


# -- what cannot be compiled --------------------------------------------------------------------------------------------


def test_an_op_that_only_cpus_have_is_refused_by_name() -> None:
    def histogram(x: torch.Tensor) -> torch.Tensor:
        return torch.histogram(x, 4).hist

    model = plait.compile(histogram, (torch.rand(16),))
    with pytest.raises(CannotRetarget, match=r"aten\.histogram\.bin_ct"):
        device_graphs(model.ready(), Targets(cuda=(90,)))


def test_no_fallback_holds_for_devices_too() -> None:
    made = ready()
    strict = replace(made, options=Options(fallback="error"))
    assert device_graphs(strict, Targets(cuda=(90,)))["cuda:90"].coverage.fallback == 0  # a sort is a library call
    torch_only = replace(strict, compiled=replace(made.compiled, options=CodegenOptions(generate=False)))
    with pytest.raises(FallbackRefused):
        device_graphs(torch_only, Targets(cuda=(90,)))


def test_ranges_of_sizes_are_those_of_the_cpu_plan() -> None:
    made = ready()
    (symbol,) = made.compiled.plan.symbols
    wide = replace(made.compiled, plan=replace(made.compiled.plan, symbols=(replace(symbol, low=1),)))
    (found,) = device_graphs(replace(made, compiled=wide), Targets(cuda=(90,)))["cuda:90"].plan.symbols
    assert found.low == 1


# -- choosing a plan ----------------------------------------------------------------------------------------------------

ALL = ("cpu", "cuda:80", "cuda:90")


@pytest.mark.parametrize(
    ("capability", "device", "target", "where"),
    [
        ((9, 0), None, "cuda:90", "cuda:0"),
        ((8, 6), None, "cuda:80", "cuda:0"),
        ((7, 5), None, "cpu", "cpu"),  # a GPU that nothing was compiled for
        ((9, 0), "cpu", "cpu", "cpu"),
        ((9, 0), "cuda", "cuda:90", "cuda:0"),
        ((8, 0), "cuda:1", "cuda:80", "cuda:1"),
    ],
)
def test_the_plan_of_the_device_is_chosen(
    capability: tuple[int, int], device: str | None, target: str, where: str, gpu: Callable[[int, int], None]
) -> None:
    gpu(*capability)
    assert devices.choose(ALL, device) == (target, torch.device(where))


def test_without_a_gpu_the_cpu_is_the_default() -> None:
    assert devices.choose(ALL) == ("cpu", torch.device("cpu"))


@pytest.mark.parametrize(
    ("targets", "device", "why"),
    [
        (ALL, "cuda:7", "cuda:7: this machine has 2 CUDA devices"),
        (("cpu", "cuda:80"), "cuda", r"cuda:0 \(compute capability 9.0\): it was compiled for cpu, cuda:80"),
        (ALL, "mps", "mps: it was compiled for"),
        (("cuda:80",), None, r"compute capability 9.0\): it was compiled for cuda:80"),
    ],
)
def test_a_device_without_a_plan_is_refused(
    targets: tuple[str, ...], device: str | None, why: str, gpu: Callable[[int, int], None]
) -> None:
    gpu(9, 0)
    with pytest.raises(DeviceNotAvailable, match=why):
        devices.choose(targets, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_loading_for_cuda_without_a_gpu_is_refused(artifact: Path) -> None:
    with pytest.raises(
        DeviceNotAvailable, match=r"cannot run on cuda: (this build of torch has no CUDA|torch finds no CUDA)"
    ):
        plait.load(artifact, device="cuda")


def test_a_damaged_list_of_plans_is_refused(artifact: Path) -> None:
    with pytest.raises(DamagedArtifact, match="list of plans"):
        plait.load(edit_manifest(artifact, lambda m: m.update(plans=[])))


# -- launching ----------------------------------------------------------------------------------------------------------

STAND_IN = r"""
#include <cstring>
#include <cstdint>
extern "C" {
struct Launched { char name[96]; int64_t grid, threads, shared, stream, first, second; } log_[64];
int launches = 0, modules = 0;
char names[64][96];
int sms[64];
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "error"; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 9 : 0; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuModuleLoadData(void** module, const void* data) {
  uint32_t flags; std::memcpy(&flags, (const char*)data + 48, 4);
  sms[++modules] = flags & 255; *module = (void*)(intptr_t)modules; return 0;
}
int cuModuleGetFunction(void** f, void* module, const char* name) {
  std::strncpy(names[(intptr_t)module], name, 95); *f = module; return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* on, void** parameters, void** extra) {
  if (gy != 1 || gz != 1 || by != 1 || bz != 1 || extra || sms[(intptr_t)f] != 90) return 999;
  Launched& l = log_[launches++];
  std::strncpy(l.name, names[(intptr_t)f], 95);
  l.grid = gx; l.threads = bx; l.shared = shared; l.stream = (intptr_t)on;
  l.first = *(int64_t*)parameters[0]; l.second = *(int64_t*)parameters[1];
  return 0;
}
}
"""


class Launched(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 96), *((n, ctypes.c_int64) for n in ("grid", "threads", "shared", "stream")),
                ("first", ctypes.c_int64), ("second", ctypes.c_int64))  # fmt: skip


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "cuda.cpp").write_text(STAND_IN)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so", tmp_path / "cuda.cpp"], check=True)
    return tmp_path / "libcuda.so"


def test_a_graph_captured_on_a_device_compiles_for_it_at_once(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.compile` does with CUDA tensors, as far as a machine without them goes."""
    driver = cuda.Driver(str(stand_in))
    monkeypatch.setattr(build, "default_driver", lambda: driver)
    graph = parse_graph('def f(x: "f32[8]@cuda:0"):\n    y = aten.exp.default(x)\n    return (y,)')
    compiled = compile_graph(graph, CodegenOptions(target="cuda:90"))
    target = Target("cuda:90")
    kernels = BACKENDS[target.kind].load(compiled.plan, compiled.sources, target, target.device(graph), "native")
    ((name, kernel),) = kernels.items()
    kernel.launch([16, 32], [], 5)
    library = ctypes.CDLL(str(stand_in))
    (one, *_) = (Launched * 64).in_dll(library, "log_")
    assert (one.name.decode(), one.grid, one.stream, one.first, one.second) == (name, 1, 5, 16, 32)


def test_a_loaded_model_launches_its_cubins_in_order(
    artifact: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch, gpu: Callable[[int, int], None]
) -> None:
    """The memory is the CPU's and the stand-in computes nothing: what is checked is what reaches the driver."""
    driver = cuda.Driver(str(stand_in))
    gpu(9, 0)
    monkeypatch.setattr(cuda, "default_driver", lambda: driver)
    monkeypatch.setattr(devices, "place", lambda plan, device: on_cpu(plan))

    def loaded_for_cpu_memory(*how: Any) -> dict[str, Any]:
        kernels = binaries.load_device(*how)
        return {n: lambda addresses, sizes, threads, k=k: k.launch(addresses, sizes, 7) for n, k in kernels.items()}

    monkeypatch.setattr(artifacts, "load_device", loaded_for_cpu_memory)
    model = plait.load(artifact)
    assert (model.target, model.device) == ("cuda:90", torch.device("cuda:0"))
    x = torch.randn(2, 9, 32)
    result = model(x)
    assert result.shape == x.shape
    library = ctypes.CDLL(str(stand_in))
    count = ctypes.c_int.in_dll(library, "launches").value
    log = list((Launched * 64).in_dll(library, "log_"))[:count]
    steps = [s for s in model.executable.plan.steps if isinstance(s, Launch)]
    assert [one.name.decode() for one in log] == [s.kernel for s in steps]
    assert all(one.grid >= 1 and one.threads % 32 == 0 and one.stream == 7 for one in log)
    assert log[0].first == x.data_ptr()
    assert result.data_ptr() in (log[-1].first, log[-1].second) or len(steps[-1].buffers) > 2


# -- torch.compile ------------------------------------------------------------------------------------------------------


def test_the_device_of_a_graph_decides_its_target(gpu: Callable[[int, int], None]) -> None:
    gpu(8, 6)
    graph = 'def f(x: "f32[8]{where}"):\n    y = aten.exp.default(x)\n    return (y,)'
    assert target_of(parse_graph(graph.format(where=""))) == "cpu"
    assert target_of(parse_graph(graph.format(where="@cuda:1"))) == "cuda:86"
