"""Compile printed Triton kernels for devices that this machine need not have."""

from __future__ import annotations

import importlib
import json
import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import CrossCompilationFailed, NoTriton, UnknownTarget
from ...runtime.cuda import DeviceBinary
from ..cache import Cache, Key
from .source import KernelConfig, TritonSource

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
"""Targets that every kernel of the test suite compiles for."""


def cross_compile(
    source: TritonSource,
    target: str,
    cache: Cache,
    *,
    config: KernelConfig | None = None,
    aligned: Sequence[str] = (),
) -> DeviceBinary:
    """`source` compiled for `target` ("cuda:90", "hip:gfx942"), from `cache` where it was compiled before.

    aligned: names of buffers and sizes that the caller promises to be multiples of 16, which allows wide memory accesses;
    launches check it. Raises NoTriton, UnknownTarget, and CrossCompilationFailed where Triton refuses the kernel.
    """
    triton = _triton()
    config = config or source.config
    kind, arch, warp = _parse(target)
    assumed = tuple(name for name, _ in source.signature() if name in aligned)
    key = Key.of(
        "triton", source=source.hash, target=target, config=repr(config), aligned=repr(assumed), triton=triton.__version__
    )

    def make(folder: Path) -> None:
        names = [name for name, _ in source.signature()]
        try:
            function = _function(source)
            params = function.arg_names[: len(names)]
            signature = dict(zip(params, (kind for _, kind in source.signature()), strict=True))
            signature.update((tile, "constexpr") for tile, _ in config.tiles)
            hints: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in assumed}
            ast = triton.compiler.ASTSource(fn=function, signature=signature, constexprs=dict(config.tiles), attrs=hints)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            with _own_cache(triton, folder):
                built = triton.compile(ast, target=triton.backends.compiler.GPUTarget(kind, arch, warp), options=options)
        except Exception as error:  # Triton has no common class for what it raises
            kept = cache.base / "failed" / f"{source.name}.py"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(source.text)
            raise CrossCompilationFailed(kernel=source.name, target=target, why=_why(error), path=kept) from error
        _store(folder, source, target, config, assumed, built)

    entry = cache.get_or_make(key, make)
    header = json.loads(entry.read("header.json"))
    return DeviceBinary.of(header, entry.read("binary"), entry.read("assembly").decode())


def _store(
    folder: Path, source: TritonSource, target: str, config: KernelConfig, assumed: tuple[str, ...], built: Any
) -> None:
    nvidia = target.startswith("cuda")
    binary, assembly = built.asm["cubin" if nvidia else "hsaco"], built.asm["ptx" if nvidia else "amdgcn"]
    made = DeviceBinary(
        target=target,
        name=built.metadata.name,
        binary=binary,
        assembly=assembly,
        parameters=source.signature(),
        grid=source.grid,
        tiles=config.tiles,
        num_warps=config.num_warps,
        shared=built.metadata.shared,
        aligned=assumed,
        scratch=getattr(built.metadata, "global_scratch_size", 0) or 0,
    )
    (folder / "binary").write_bytes(binary)
    (folder / "assembly").write_text(assembly)
    (folder / "header.json").write_text(json.dumps(made.header()))


def _parse(target: str) -> tuple[str, int | str, int]:
    """(backend, architecture, threads of a warp)."""
    kind, _, arch = target.partition(":")
    if kind == "cuda" and arch.isdigit():
        return kind, int(arch), 32
    if kind == "hip" and arch.startswith("gfx"):
        return kind, arch, 64 if arch.startswith("gfx9") else 32
    raise UnknownTarget(target=target)


def _triton() -> Any:
    try:
        triton: Any = importlib.import_module("triton")
        importlib.import_module("triton.backends.compiler")
    except ImportError as error:
        raise NoTriton(why=str(error), how="install it: pip install triton") from error
    if triton.knobs.runtime.interpret:
        how = "unset TRITON_INTERPRET; plait's Interpreter sets it for its own process only"
        raise NoTriton(why="TRITON_INTERPRET is set, and interpreted functions cannot be compiled", how=how)
    return triton


@contextmanager
def _own_cache(triton: Any, folder: Path) -> Iterator[None]:
    """Triton's own cache in a folder that is deleted: it would give back binaries that name other files."""
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        triton.knobs.cache.dir = scratch
        yield


def _function(source: TritonSource) -> Any:
    """The `@triton.jit` function of a source, in a module that lies in no file.

    inspect reads the text back from linecache. Binaries name the file in their line tables: by a name that is the same on
    every machine.
    """
    name = f"{source.name}.py"
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    module = ModuleType("plait_kernel")
    exec(compile(source.text, name, "exec"), module.__dict__)
    return getattr(module, source.name)


def _why(error: BaseException) -> str:
    """The innermost message: Triton wraps errors once per inlined function."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Resources:
    """What one thread, or one program, of a compiled CUDA kernel occupies. `spilled`: bytes of registers kept in memory."""

    registers: int
    spilled: int
    shared: int


def resources(binary: DeviceBinary, folder: Path) -> Resources | None:
    """Registers and spills of a CUDA binary, by the cuobjdump in Triton's wheel; None where that or the target is missing.

    The binary is written to `folder` for the tool.
    """
    tool = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not binary.target.startswith("cuda") or not tool.exists():
        return None
    path = folder / f"{binary.name}.cubin"
    path.write_bytes(binary.binary)
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], max(found["SHARED"], binary.shared))
