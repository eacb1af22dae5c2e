"""Built kernels: every distinct source is one shared object in the disk cache, compiled side by side where missing."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from .cache import Cache, Key, default_root, sha256
from .cpp.build import build, toolchain

_FILE = "kernel.so"


@lru_cache(maxsize=8)
def disk_cache(root: Path) -> Cache:
    """The cache below `root`; one object per folder and process."""
    return Cache(root)


def current_cache() -> Cache:
    """The cache that the settings name now."""
    return disk_cache(default_root())


def load_kernels(sources: Mapping[str, str], cache: Cache, isa: str = "native") -> dict[str, int]:
    """Address of each kernel's function. Missing ones are compiled, as many at a time as there are cores.

    Raises NoCompiler, KernelBuildFailed.
    """
    if not sources:
        return {}
    parts = toolchain(isa)
    keys = {name: Key.of("kernel", source=f"sha256:{sha256(source)}", **parts) for name, source in sources.items()}
    distinct = {key: name for name, key in keys.items()}

    def make(item: tuple[Key, str]) -> Path:
        key, name = item

        def compile_into(folder: Path) -> None:
            scratch = folder / "build"
            built = build({name: sources[name]}, scratch, isa=isa, jobs=1)[name]
            os.replace(built, folder / _FILE)
            for leftover in scratch.iterdir():
                leftover.unlink()
            scratch.rmdir()

        return cache.get_or_make(key, compile_into).path(_FILE)

    with ThreadPoolExecutor(max(1, min(len(distinct), len(os.sched_getaffinity(0))))) as pool:
        paths = dict(zip(distinct, pool.map(make, distinct.items()), strict=True))
    return {name: _address(paths[key], name) for name, key in keys.items()}


def _address(path: Path, name: str) -> int:
    function = getattr(ctypes.CDLL(str(path)), name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, f"{name} has no address"
    return address
