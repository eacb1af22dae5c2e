"""The kernels of an artifact, made callable: loaded where a binary fits, rebuilt from source where none does."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import DamagedArtifact, KernelMissing, NoBinaryFits, NoCompiler
from . import cuda, machine, native
from .archive import MANIFEST, Archive
from .plan import Plan

log = logging.getLogger(__name__)

SOURCES = "kernels/src/"
BINARIES = "kernels/bin/"


def target_folder(target: str) -> str:
    """Where the binaries of a target lie in an artifact."""
    return f"{BINARIES}{target.replace(':', '-')}/"


def kernel_names(plan: Plan, language: str) -> list[str]:
    """The kernels of one language that a plan and its regions launch, in order."""
    own = [k.name for k in plan.kernels if k.language == language]
    inner = [name for _, region in plan.regions for name in kernel_names(region, language)]
    return list(dict.fromkeys([*own, *inner]))


def load_native(archive: Archive, names: list[str]) -> tuple[dict[str, int], native.Runner | None]:
    """The addresses of the C++ kernels called `names` and the native runner.

    Raises NoBinaryFits with the reason where neither a binary of the artifact nor a build from its sources works here,
    KernelMissing for a kernel that the binaries do not have.
    """
    if not names:
        return {}, None
    libraries = _libraries(archive)
    addresses = {}
    for name in names:
        found = next((f for library in libraries if (f := getattr(library, name, None)) is not None), None)
        if found is None:
            raise KernelMissing(kind="kernel", name=name)
        addresses[name] = ctypes.cast(found, ctypes.c_void_p).value or 0
    runner = next((library for library in libraries if hasattr(library, "plait_run")), None)
    if runner is None:
        raise KernelMissing(kind="binary", name="runner.so")
    return addresses, native.Runner(runner)


def _libraries(archive: Archive) -> list[ctypes.CDLL]:
    targets = _targets(archive.manifest)
    why = "the artifact has no binary for this machine"
    for target in machine.fitting(targets):
        folder = target_folder(target)
        try:
            return [ctypes.CDLL(str(_extract(archive, name))) for name in archive.names if name.startswith(folder)]
        except OSError as error:  # for example built against a newer C library
            why = str(error)
            log.warning("the binaries for %s do not load: %s", target, error)
    name, flags = machine.host()
    try:
        return [ctypes.CDLL(str(_rebuild(archive)))]
    except (NoCompiler, OSError) as error:
        shown = (
            f"{name} ({' '.join(f for f in sorted(flags) if f.startswith(('avx', 'sse4', 'sve', 'asimd'))) or 'unknown'})"
        )
        reason = error.message.format(**error.fields) if isinstance(error, NoCompiler) else str(error)
        raise NoBinaryFits(have=", ".join(sorted(targets)) or "no target", machine=shown, why=f"{why}; {reason}") from None


def _targets(manifest: Mapping[str, Any]) -> dict[str, Any]:
    targets = manifest.get("targets", {})
    well_formed = isinstance(targets, dict) and all(
        isinstance(t, dict)
        and isinstance(t.get("machine"), str)
        and isinstance(t.get("requires"), list)
        and all(isinstance(f, str) for f in t["requires"])
        for t in targets.values()
    )
    if not well_formed:
        raise DamagedArtifact(part=MANIFEST, why="its targets are ill-formed")
    return targets


def _extract(archive: Archive, name: str) -> Path:
    """The member as a file in the private cache folder, named by its content."""
    content = archive.view(name)
    digest = archive.manifest["members"][name]["sha256"]

    def good(path: Path) -> bool:
        try:
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == digest
        except FileNotFoundError:
            return False
        if not whole:
            log.warning("%s was altered: written again", path)
        return whole

    def write(path: Path) -> None:
        descriptor, scratch = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(scratch, path)
        except OSError:
            os.unlink(scratch)
            raise

    return native.keep(f"{digest[:40]}.so", write, good)


def _rebuild(archive: Archive) -> Path:
    """A shared object of all sources for exactly this machine, from the cache or built now."""
    asked = archive.manifest.get("build", [])
    if not isinstance(asked, list) or not all(isinstance(flag, str) for flag in asked):
        raise DamagedArtifact(part=MANIFEST, why="its build flags are ill-formed")
    flags = [*asked, "-march=native"]
    sources = {n.removeprefix(SOURCES): archive.text(n) for n in archive.names if n.startswith(SOURCES)}
    key = hashlib.sha256(repr([sorted(sources.items()), flags, *map(sorted, machine.host()[1:])]).encode()).hexdigest()

    def build(path: Path) -> None:
        log.warning("no binary of %s fits this machine: building its kernels from source", archive.path.name)
        units = [text for name, text in sorted(sources.items()) if name.endswith(".cpp")]
        headers = {name: text for name, text in sources.items() if not name.endswith((".cpp", ".py"))}
        native.build_shared(units, path, flags, headers)

    return native.keep(f"rebuilt-{key[:40]}.so", build)


def load_device(archive: Archive, names: list[str], device: int) -> dict[str, Any]:
    """The device kernels called `names`, loaded through the driver for device number `device`."""
    if not names:
        return {}
    listed = archive.manifest.get("device_kernels", {})
    kernels = {}
    for name in names:
        entries = listed.get(name) if isinstance(listed, dict) else None
        if not entries:
            raise KernelMissing(kind="kernel", name=name)
        binaries = []
        for entry in entries:
            try:
                image, assembly = bytes(archive.view(entry["binary"])), archive.text(entry["assembly"])
                binaries.append(cuda.DeviceBinary.of(entry["header"], image, assembly))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise DamagedArtifact(part=MANIFEST, why=f"its entry for the kernel {name!r} is ill-formed") from None
        kernels[name] = cuda.CudaKernel(binaries, device)
    return kernels
