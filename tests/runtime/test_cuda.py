"""Launching compiled kernels, against a stand-in for libcuda that records what it is asked for."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from plait.errors import CudaCallFailed, MisalignedBuffer, NoBinaryForDevice, NoCudaDriver
from plait.runtime.cuda import CudaKernel, DeviceBinary, Driver, fits

SOURCE = r"""
#include <cstring>
#include <cstdint>
extern "C" {
int capability = 90, fail_launch = 0, has_context = 0, loads = 0, shared_asked = 0, depth = 0, depth_of_launch = 0;
char loaded[64], function[64];
int64_t grid, threads, shared, stream, arguments[16];
int launches = 0, count = 0;

int cuInit(unsigned) { return 0; }
int cuGetErrorName(int code, const char** name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER"; return 0;
}
int cuGetErrorString(int code, const char** text) { *text = "out of memory"; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? capability / 10 : capability % 10; return 0; }
int cuCtxGetCurrent(void** context) { *context = has_context ? (void*)1 : nullptr; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)1; return 0; }
int cuCtxSetCurrent(void*) { has_context = 1; return 0; }
int cuCtxGetDevice(int* device) { *device = 0; return 0; }
int cuCtxPushCurrent_v2(void*) { depth++; return 0; }
int cuCtxPopCurrent_v2(void**) { depth--; return 0; }
int cuModuleLoadData(void** module, const void* data) {
  std::strncpy(loaded, (const char*)data, 63); *module = (void*)(intptr_t)(++loads); return 0;
}
int cuModuleGetFunction(void** f, void* module, const char* name) {
  std::strncpy(function, name, 63); *f = module; return 0;
}
int cuFuncSetAttribute(void*, int which, int value) { if (which == 8) shared_asked = value; return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void* on, void** parameters, void** extra) {
  depth_of_launch = depth;
  if (fail_launch) return fail_launch;
  if (gy != 1 || gz != 1 || by != 1 || bz != 1 || extra) return 999;
  launches++; grid = gx; threads = bx; shared = shared_bytes; stream = (intptr_t)on; count = (intptr_t)f;
  for (int i = 0; i < 6; i++) arguments[i] = *(int64_t*)parameters[i];
  return 0;
}
}
"""

BINARY = DeviceBinary(
    target="cuda:90",
    name="scale",
    binary=b"cubin of sm_90",
    assembly="",
    parameters=(("x", "*fp32"), ("out", "*fp32"), ("M", "i64"), ("N", "i64")),
    grid=["ceildiv", ["mul", "M", "N"], "XBLOCK"],
    tiles=(("XBLOCK", 256),),
    num_warps=8,
    shared=100,
)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda.cpp").write_text(SOURCE)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", folder / "libcuda.so", folder / "cuda.cpp"], check=True)
    return folder / "libcuda.so"


class Record:
    """The stand-in's globals."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def get(self, name: str, kind: type = ctypes.c_int):
        return kind.in_dll(self._library, name).value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self._library, name).value = value

    def arguments(self) -> list[int]:
        return list((ctypes.c_int64 * 16).in_dll(self._library, "arguments"))[:6]


@pytest.fixture
def record(stand_in: Path):
    made = Record(stand_in)
    for name, value in {"capability": 90, "fail_launch": 0, "launches": 0, "loads": 0, "shared_asked": 0}.items():
        made.set(name, value)
    return made


@pytest.fixture
def driver(stand_in: Path) -> Driver:
    return Driver(str(stand_in))


def test_a_launch_passes_arguments_grid_and_stream(driver: Driver, record: Record) -> None:
    record.set("has_context", 0)
    kernel = CudaKernel([BINARY], device=0, driver=driver)
    assert record.get("has_context") == 1 and record.get("shared_asked") == 0
    kernel.launch([0x1000, 0x2000], [3, 100], stream=77)
    assert record.arguments() == [0x1000, 0x2000, 3, 100, 0, 0]
    numbers = {name: record.get(name, ctypes.c_int64) for name in ("grid", "threads", "shared", "stream")}
    assert numbers == {"grid": 2, "threads": 256, "shared": 100, "stream": 77}
    assert (ctypes.c_char * 64).in_dll(record._library, "function").value == b"scale"


def test_a_kernel_on_another_device_than_the_threads_enters_and_leaves_it(driver: Driver, record: Record) -> None:
    record.set("has_context", 1)
    kernel = CudaKernel([BINARY], device=1, driver=driver)
    kernel.launch([16, 16], [1, 1], stream=0)
    assert (record.get("depth_of_launch"), record.get("depth")) == (1, 0)
    record.set("fail_launch", 2)
    with pytest.raises(CudaCallFailed):
        kernel.launch([16, 16], [1, 1], stream=0)
    assert record.get("depth") == 0


def test_without_programs_nothing_is_launched(driver: Driver, record: Record) -> None:
    CudaKernel([BINARY], driver=driver).launch([0, 0], [0, 100], stream=0)
    assert record.get("launches") == 0


def test_much_shared_memory_is_asked_for(driver: Driver, record: Record) -> None:
    CudaKernel([replace(BINARY, shared=100_000)], driver=driver)
    assert record.get("shared_asked") == 100_000


def test_the_binary_that_assumes_most_and_may_is_taken(driver: Driver, record: Record) -> None:
    wide = replace(BINARY, aligned=("x", "N"))
    kernel = CudaKernel([BINARY, wide], driver=driver)  # loaded as 1: wide, 2: plain
    for x, n, taken in ((16, 32, 1), (8, 32, 2), (16, 31, 2)):
        kernel.launch([x, 3], [1, n], stream=0)
        assert record.get("count") == taken
    with pytest.raises(MisalignedBuffer, match="N being a multiple of 16, got 7"):
        CudaKernel([wide], driver=driver).launch([16, 3], [1, 7], stream=0)


def test_binaries_run_on_the_devices_they_fit() -> None:
    runs = [("cuda:80", 80), ("cuda:80", 86), ("cuda:86", 86), ("cuda:90", 90), ("cuda:120", 120)]
    fails = [("cuda:86", 80), ("cuda:80", 90), ("cuda:90", 100), ("cuda:100", 103), ("hip:gfx942", 90)]
    assert [p for p in runs if not fits(*p)] == [] and [p for p in fails if fits(*p)] == []


def test_the_newest_binary_that_fits_is_loaded(driver: Driver, record: Record) -> None:
    record.set("capability", 89)
    old, new = (replace(BINARY, target=t, binary=t.encode()) for t in ("cuda:80", "cuda:86"))
    CudaKernel([old, new, BINARY], driver=driver)
    assert record.get("loads") == 1 and (ctypes.c_char * 64).in_dll(record._library, "loaded").value == b"cuda:86"


def test_no_binary_for_the_device(driver: Driver, record: Record) -> None:
    record.set("capability", 75)
    with pytest.raises(
        NoBinaryForDevice, match=r"kernel scale has no binary for cuda:0 \(compute capability 7\.5\); it has: cuda:90"
    ):
        CudaKernel([BINARY], driver=driver)


def test_a_refused_launch_is_an_error_with_the_drivers_words(driver: Driver, record: Record) -> None:
    kernel = CudaKernel([BINARY], driver=driver)
    record.set("fail_launch", 2)
    with pytest.raises(
        CudaCallFailed, match=r"cuLaunchKernel of kernel scale failed: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)"
    ):
        kernel.launch([0, 0], [1, 1], stream=0)


def test_a_machine_without_driver(tmp_path: Path) -> None:
    with pytest.raises(NoCudaDriver, match="nowhere"):
        Driver(str(tmp_path / "nowhere.so"))
