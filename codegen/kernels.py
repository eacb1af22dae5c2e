"""Built kernels: distinct sources are compiled once, side by side, and their shared objects kept in the disk cache."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from .cache import Cache, Entry, Key, default_root, sha256
from .cpp.build import build, deal, side_by_side, toolchain
from .objects import WHERE, where
from .templates.matmul import drivers

_FILE = "kernels.so"


@lru_cache(maxsize=8)
def disk_cache(root: Path) -> Cache:
    """The cache below `root`; one object per folder and process."""
    return Cache(root)


def current_cache() -> Cache:
    """The cache that the settings name now."""
    return disk_cache(default_root())


def load_kernels(sources: Mapping[str, str], cache: Cache, isa: str = "native") -> dict[str, int]:
    """Address of each kernel's function. Missing ones are dealt to as many compilers as there are cores.

    What templates share, the drivers of matrix products, is built once and loaded first. Raises NoCompiler,
    KernelBuildFailed.
    """
    if not sources:
        return {}
    shared = {name: text for source in sources.values() for name, text in drivers(source).items()}
    found = _Builds(cache, isa).objects(sources, shared)
    for name in shared:
        ctypes.CDLL(str(found[name]), mode=ctypes.RTLD_GLOBAL)
    return {name: _address(found[name], name) for name in sources}


def unbuilt(sources: Mapping[str, str], cache: Cache, isa: str = "native") -> int:
    """How many functions `load_kernels` would have to build, drivers included. Raises NoCompiler."""
    if not sources:
        return 0
    builds = _Builds(cache, isa)
    shared = {text for source in sources.values() for text in drivers(source).values()}
    return sum(builds.known(builds.key(text)) is None for text in {*sources.values(), *shared})


class _Builds:
    """Shared objects in the disk cache. An entry of kind "objects" is what one run of the compiler made of several sources;
    one of kind "kernel" says for a source where its function is."""

    def __init__(self, cache: Cache, isa: str) -> None:
        self.cache, self.isa = cache, isa
        self.parts = toolchain(isa)
        self.core = sha256(json.dumps(self.parts))[:12]  # drivers of another build have other names
        self.seen: dict[str, Path | None] = {}

    def key(self, text: str) -> Key:
        return Key.of("kernel", source=f"sha256:{sha256(text)}", **self.parts)

    def objects(self, sources: Mapping[str, str], shared: Mapping[str, str]) -> dict[str, Path]:
        """The shared object that holds each source's function, by name; equal sources are one function. Those of `shared`
        have objects of their own, since others need them to be loaded."""
        texts = {**shared, **sources}
        names: dict[Key, list[str]] = {}
        for name, text in texts.items():
            names.setdefault(self.key(text), []).append(name)
        found = {key: self.known(key) for key in names}
        missing = [names[key][0] for key, path in found.items() if path is None]
        cores = len(os.sched_getaffinity(0))
        groups = [{n: texts[n]} for n in missing if n in shared]  # they take longest, so they come first
        alike: dict[frozenset[str], dict[str, str]] = {}  # what is loaded together needs the same drivers
        for n in missing:
            if n not in shared:
                alike.setdefault(frozenset(drivers(texts[n])), {})[n] = texts[n]
        groups += [group for some in alike.values() for group in deal(some, cores)]
        for made in side_by_side(self.make, groups, cores):
            found.update(made)
        return {name: path for key, path in found.items() for name in names[key] if path is not None}

    def known(self, key: Key) -> Path | None:
        """The object of a source that was built before."""
        entry = self.cache.get(key)
        if not isinstance(entry, Entry):
            return None
        digest, _ = where(entry)
        if digest not in self.seen:
            group = self.cache.get(Key.of("objects", kernels=digest, **self.parts))
            self.seen[digest] = group.path(_FILE) if isinstance(group, Entry) else None
        return self.seen[digest]

    def make(self, group: Mapping[str, str]) -> dict[Key, Path]:
        """Build sources into one object and note where each is."""
        digest = f"sha256:{sha256(''.join(sorted(map(sha256, group.values()))))}"

        def compile_into(folder: Path) -> None:
            scratch = folder / "build"
            built = build(group, scratch, isa=self.isa, flags=(f"-DPLAIT_CORE={self.core}",), jobs=1)
            os.replace(next(iter(built.values())), folder / _FILE)
            shutil.rmtree(scratch)

        path = self.cache.get_or_make(Key.of("objects", kernels=digest, **self.parts), compile_into).path(_FILE)
        keys = {name: self.key(text) for name, text in group.items()}
        for name, key in keys.items():
            self.cache.replace(key, {WHERE: f"{digest} {name}".encode()})
        return dict.fromkeys(keys.values(), path)


def _address(path: Path, name: str) -> int:
    function = getattr(ctypes.CDLL(str(path)), name)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None, f"{name} has no address"
    return address
