"""Kernels compiled ahead of time, launched through the CUDA driver: no Triton, no compiler, no CUDA toolkit.

The calling convention is the one of Triton 3.6 and 3.7 kernels: the pointers, the int64 sizes, then a pointer to scratch
memory that the kernel asked for and one to a profiler's scratch memory; every parameter is eight bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CudaCallFailed, MisalignedBuffer, NoBinaryForDevice, NoCudaDriver
from .sizes import SizeExpr, evaluate, fold

LIBRARY = "libcuda.so.1"
WARP = 32
_STATIC_SHARED_LIMIT = 48 * 1024  # beyond this a kernel must ask for its shared memory
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class DeviceBinary:
    """A kernel compiled for one device target, with what a launch needs to know. Plain data; see `header`.

    target: "cuda:90", "hip:gfx942". binary: cubin or hsaco; assembly: PTX or AMDGCN text. parameters: (name, type) of the
    user's arguments, types as Triton writes them (`*fp32`, `i64`). aligned: names of parameters that the code takes to be
    multiples of 16. grid: number of programs over the sizes and `tiles`. shared: bytes. scratch: bytes of global memory
    per program.
    """

    target: str
    name: str
    binary: bytes = field(repr=False)
    assembly: str = field(repr=False)
    parameters: tuple[tuple[str, str], ...]
    grid: SizeExpr
    tiles: tuple[tuple[str, int], ...]
    num_warps: int
    shared: int
    aligned: tuple[str, ...] = ()
    scratch: int = 0

    def header(self) -> dict[str, Any]:
        """Everything but binary and assembly, as JSON data."""
        names = ("target", "name", "parameters", "grid", "tiles", "num_warps", "shared", "aligned", "scratch")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def of(header: Mapping[str, Any], binary: bytes, assembly: str) -> DeviceBinary:
        """The inverse of `header`."""
        pairs = {name: tuple((str(a), b) for a, b in header[name]) for name in ("parameters", "tiles")}
        return DeviceBinary(**{**header, **pairs, "aligned": tuple(header["aligned"])}, binary=binary, assembly=assembly)

    @property
    def bound_grid(self) -> SizeExpr:
        """`grid` with the tile sizes put in: an expression over the kernel's sizes alone."""
        return fold(_bind(self.grid, dict(self.tiles)))


def _bind(expr: SizeExpr, values: Mapping[str, int]) -> SizeExpr:
    if isinstance(expr, list):
        return [expr[0], *(_bind(part, values) for part in expr[1:])]
    return values.get(expr, expr) if isinstance(expr, str) else expr


class Driver:
    """The CUDA driver's functions that launching needs. Every call returns a status, which `call` turns into an error."""

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise NoCudaDriver(why=str(error)) from error
        code = self._library.cuInit(0)
        if code:
            raise NoCudaDriver(why=f"cuInit gives {self._name(code)}")

    def call(self, kernel: str, function: str, *args: Any) -> None:
        """Call `function` on behalf of `kernel`. Raises CudaCallFailed."""
        code = getattr(self._library, function)(*args)
        if code:
            raise CudaCallFailed(call=function, kernel=kernel, name=self._name(code), what=self._text(code))

    def _name(self, code: int) -> str:
        name = ctypes.c_char_p()
        self._library.cuGetErrorName(code, ctypes.byref(name))
        return name.value.decode() if name.value else f"error {code}"

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return text.value.decode() if text.value else "no description"

    def capability(self, device: int) -> int:
        """Compute capability of device number `device`, as 90 for 9.0."""
        handle, value = ctypes.c_int(), ctypes.c_int()
        self.call("", "cuDeviceGet", ctypes.byref(handle), device)
        major, minor = (self._attribute(value, which, handle) for which in _CAPABILITY)
        return major * 10 + minor

    def _attribute(self, value: ctypes.c_int, which: int, handle: ctypes.c_int) -> int:
        self.call("", "cuDeviceGetAttribute", ctypes.byref(value), which, handle)
        return value.value

    def enter(self, kernel: str, device: int) -> bool:
        """Make a context of `device` this thread's; True where it was another device's before, which `leave` restores.

        A fresh thread gets the device's primary context, which torch uses, and keeps it.
        """
        context, current, handle = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        self.call(kernel, "cuCtxGetCurrent", ctypes.byref(context))
        self.call(kernel, "cuDeviceGet", ctypes.byref(handle), device)
        if context.value:
            self.call(kernel, "cuCtxGetDevice", ctypes.byref(current))
            if current.value == handle.value:
                return False
        here = bool(context.value)
        self.call(kernel, "cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.call(kernel, "cuCtxPushCurrent_v2" if here else "cuCtxSetCurrent", context)
        return here

    def leave(self, kernel: str) -> None:
        """Give the thread back the context that it had before `enter`."""
        self.call(kernel, "cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def default_driver() -> Driver:
    """The machine's CUDA driver. Raises NoCudaDriver."""
    return Driver()


def fits(target: str, capability: int) -> bool:
    """Whether a binary for `target` runs on a device of `capability` (90 for 9.0).

    Within a major version newer devices run older binaries, but from 9.0 on Triton compiles for exactly one architecture
    (sm_90a), which no other device runs.
    """
    kind, _, version = target.partition(":")
    if kind != "cuda":
        return False
    sm = int(version)
    return sm == capability or (sm < 90 and sm // 10 == capability // 10 and sm <= capability)


@dataclass(frozen=True)
class _Loaded:
    binary: DeviceBinary
    function: ctypes.c_void_p
    grid: SizeExpr
    sizes: tuple[str, ...]
    aligned: tuple[int, ...]  # positions of parameters that must be multiples of 16


class CudaKernel:
    """One kernel on one device. Loads the binaries that fit when it is built, so that launches can be captured in graphs.

    Among several that fit, a launch takes the one that assumes most about alignment and whose assumptions hold.
    """

    def __init__(self, binaries: Sequence[DeviceBinary], device: int = 0, driver: Driver | None = None) -> None:
        """Raises NoCudaDriver, NoBinaryForDevice, and CudaCallFailed where the driver refuses a binary."""
        self._driver = driver or default_driver()
        self._device = device
        self.name = binaries[0].name
        capability = self._driver.capability(device)
        usable = [b for b in binaries if fits(b.target, capability)]
        if not usable:
            raise NoBinaryForDevice(
                kernel=self.name,
                device=f"cuda:{device}",
                capability=f"{capability // 10}.{capability % 10}",
                targets=", ".join(sorted({b.target for b in binaries})) or "none",
            )
        best = max(int(b.target.partition(":")[2]) for b in usable)
        usable = [b for b in usable if b.target == f"cuda:{best}"]
        self._loaded = self._on_device(lambda: [self._load(b) for b in sorted(usable, key=lambda b: -len(b.aligned))])

    def _on_device(self, act: Callable[[], Any]) -> Any:
        away = self._driver.enter(self.name, self._device)
        try:
            return act()
        finally:
            if away:
                self._driver.leave(self.name)

    def _load(self, binary: DeviceBinary) -> _Loaded:
        call, name = self._driver.call, binary.name
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        call(name, "cuModuleLoadData", ctypes.byref(module), binary.binary)
        call(name, "cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        if binary.shared > _STATIC_SHARED_LIMIT:
            call(name, "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, binary.shared)
        names = [parameter for parameter, _ in binary.parameters]
        sizes = tuple(parameter for parameter, kind in binary.parameters if not kind.startswith("*"))
        aligned = tuple(names.index(a) for a in binary.aligned)
        return _Loaded(binary, function, binary.bound_grid, sizes, aligned)

    def launch(self, addresses: Sequence[int], sizes: Sequence[int], stream: int) -> None:
        """Queue the kernel on `stream` (a CUstream handle) with buffer addresses and sizes in the order of its parameters.

        Nothing is queued where the sizes give no program. Raises MisalignedBuffer where every binary assumes more about
        alignment than holds, CudaCallFailed where the driver refuses the launch.
        """
        numbers = [*addresses, *sizes]
        loaded = next((one for one in self._loaded if all(numbers[i] % 16 == 0 for i in one.aligned)), None)
        if loaded is None:
            at = next(i for i in self._loaded[-1].aligned if numbers[i] % 16)
            parameter = self._loaded[-1].binary.parameters[at][0]
            raise MisalignedBuffer(kernel=self.name, parameter=parameter, value=numbers[at])
        programs = evaluate(loaded.grid, dict(zip(loaded.sizes, sizes, strict=True)))
        if programs == 0:
            return
        binary = loaded.binary
        scratch = self._scratch(binary.scratch * programs, stream)
        count = len(numbers) + 2
        values = (ctypes.c_uint64 * count)(*numbers, 0 if scratch is None else scratch.data_ptr(), 0)
        start = ctypes.addressof(values)
        parameters = (ctypes.c_void_p * count)(*range(start, start + 8 * count, 8))
        launch = [loaded.function, programs, 1, 1, WARP * binary.num_warps, 1, 1, binary.shared, ctypes.c_void_p(stream)]
        self._on_device(lambda: self._driver.call(self.name, "cuLaunchKernel", *launch, parameters, None))

    def _scratch(self, size: int, stream: int) -> torch.Tensor | None:
        """Scratch memory from torch's allocator, which gives it to later work of the same stream only."""
        if size == 0:
            return None
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=self._device)):
            return torch.empty(size, dtype=torch.uint8, device=f"cuda:{self._device}")
