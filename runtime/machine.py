"""Which CPU targets this machine runs. A target requires a set of CPU flags, as /proc/cpuinfo names them."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")


@dataclass(frozen=True)
class Target:
    """A kind of machine that binaries are built for: processor family and the CPU flags that it must have."""

    machine: str
    requires: tuple[str, ...]

    def fits(self, machine: str, flags: frozenset[str]) -> bool:
        """Whether binaries for this target run on such a machine."""
        return self.machine == machine and flags.issuperset(self.requires)


TARGETS = {
    "x86-64-v3": Target("x86_64", _V3),
    "x86-64-v4": Target("x86_64", (*_V3, *_V4)),
    "x86-64-v4-dot": Target("x86_64", (*_V3, *_V4, "avx512_bf16", "avx512_vnni")),
    "aarch64": Target("aarch64", ()),
}


@functools.cache
def host() -> tuple[str, frozenset[str]]:
    """(processor family, CPU flags) of this machine; no flags where the system does not tell them."""
    name = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    row = next((r for r in rows if r.startswith(("flags", "Features"))), ":")
    return name, frozenset(row.split(":", 1)[1].split())


def fitting(targets: Mapping[str, Any]) -> list[str]:
    """The names of the targets (as in a manifest) that this machine runs, the most demanding first."""
    machine, flags = host()
    known = {name: Target(t["machine"], tuple(t["requires"])) for name, t in targets.items()}
    found = [name for name, target in known.items() if target.fits(machine, flags)]
    return sorted(found, key=lambda name: (-len(known[name].requires), name))
