"""What a figure depends on besides the code: machine, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy", "sympy")


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use, memory, instruction set as torch sees it, operating system."""
    return {
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, plait, the packages that matter and the C++ compiler; None for what is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "plait": _version("plait")}
    found.update({name: _version(name) for name in PACKAGES})
    compiler = shutil.which("g++") or shutil.which("clang++")
    found["c++"] = _first_line([compiler, "--version"]) if compiler else None
    return found


@cache
def commit() -> str:
    """The short commit of the checkout, with `+` where tracked files differ from it; "unknown" outside of git."""
    head = _first_line(["git", "rev-parse", "--short=10", "HEAD"])
    if head is None:
        return "unknown"
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"])
    return head + ("+" if changed else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]
