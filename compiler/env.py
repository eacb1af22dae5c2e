"""What this machine and installation are: for `plait env`, benchmark records and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__, config
from ..codegen.cache import Cache
from ..codegen.cpp import build
from ..errors import NoCompiler

VARIABLES: dict[str, str] = {
    **{env: doc for _, env, _, doc in config.describe()},
    "CXX": "the C++ compiler (default: g++, then c++)",
    "OMP_NUM_THREADS": "threads of kernels, as torch counts them",
    "TRITON_INTERPRET": "1: run Triton kernels on the CPU by Triton's interpreter",
    "TORCH_LOGS": "+plait: debug logs of plait",
    "TORCH_TRACE": "folder for structured traces, which tlparse shows",
}
"""Environment variables that change what plait does, each with its one line of documentation."""


def environment() -> dict[str, Any]:
    """Versions, processor, compiler, devices, cache and the environment variables that matter, as plain data."""
    return {
        "plait": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "instruction_set": build.host_isa(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "cxx": compiler(),
        "devices": devices(),
        "cache": _cache(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def version(package: str) -> str | None:
    """A package's version, None where it is not installed. Does not import it."""
    if find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def compiler() -> str:
    """Path and version of the C++ compiler, or why there is none."""
    try:
        return f"{build.compiler()} ({build.compiler_version()})"
    except NoCompiler as error:
        return str(error)


def devices() -> list[str]:
    """CUDA devices with name and compute capability."""
    if not torch.cuda.is_available():
        return []
    found: list[str] = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"cuda:{i} {torch.cuda.get_device_name(i)} sm_{major}{minor}")
    return found


def _cache() -> dict[str, Any]:
    cache = Cache()
    entries = cache.entries()
    return {
        "folder": str(cache.root),
        "entries": len(entries),
        "bytes": sum(e.size for e in entries),
        "limit": cache.limit,
        "off": cache.off,
    }
