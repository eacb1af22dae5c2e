"""Building shared objects from generated C++: one per distinct source, several compilers side by side."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...cost.device import cpu_flags
from ...cost.device import host_isa as host_isa  # for callers of this module: the instruction set to build for
from ...errors import KernelBuildFailed, NoCompiler

HEADER_DIRS = (Path(__file__).parent, Path(__file__).parents[1] / "templates")
HEADERS = tuple(sorted(header for folder in HEADER_DIRS for header in folder.glob("*.h")))

# No -ffast-math: inf, NaN and the order of sums are the kernel's meaning. -fno-math-errno and -fno-trapping-math only give
# up C's error reporting. -ffp-contract=off because GCC contracts a * b + c per instance of the code: a full tile and a
# partial tile of one loop, or the same expression beside other code, could round differently; where one rounding is wanted
# the source says fma(). -fwrapv: integer overflow wraps, as in torch.
FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fwrapv",
    "-fopenmp", "-shared", "-fPIC", "-Wno-psabi",
)  # fmt: skip

DOTS = "x86-64-v4-dot"
"""The instruction set with products of bfloat16 pairs and of bytes, for kernels that `has_dots` names."""

ISAS = {
    "native": ("-march=native",),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64-v4": ("-march=x86-64-v4",),
    DOTS: ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    "aarch64": ("-march=armv8.2-a",),
}


def compiler(isa: str = "native") -> str:
    """Path of the C++ compiler for `isa`: $CXX, else g++, else c++; for aarch64 from elsewhere Debian's cross compiler.

    Raises NoCompiler.
    """
    if isa == "aarch64" and platform.machine() not in ("aarch64", "arm64"):
        tried = ["aarch64-linux-gnu-g++"]
    else:
        tried = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    for name in tried:
        if found := shutil.which(name):
            return found
    raise NoCompiler(tried=", ".join(tried))


@functools.cache
def _version_of(path: str) -> str:
    run = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()[0]


def compiler_version(isa: str = "native") -> str:
    """First line of `compiler --version`. Raises NoCompiler."""
    return _version_of(compiler(isa))


def command(isa: str = "native", flags: Sequence[str] = ()) -> list[str]:
    """The compiler's command line for `isa` (a key of ISAS), without sources and output."""
    return [compiler(isa), *FLAGS, *ISAS[isa], *flags, *(f"-I{folder}" for folder in HEADER_DIRS)]


def toolchain(isa: str = "native", flags: Sequence[str] = ()) -> dict[str, str]:
    """What a binary depends on besides its source, by name: compiler, flags, headers and, for "native", this machine.

    Raises NoCompiler.
    """
    return {
        "compiler": compiler_version(isa),
        "flags": " ".join((*FLAGS, *ISAS[isa], *flags)),
        "headers": hashlib.sha256("".join(map(_header_hash, HEADERS)).encode()).hexdigest(),
        "machine": " ".join(sorted(cpu_flags())) if isa == "native" else "",
    }


def _header_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_hash(source: str, isa: str = "native", flags: Sequence[str] = ()) -> str:
    """Name of the binary that `source` builds to: covers all of `toolchain`."""
    return _hash(toolchain(isa, flags), source)


def _hash(parts: Mapping[str, str], source: str) -> str:
    return hashlib.sha256("\n".join((*parts.values(), source)).encode()).hexdigest()[:32]


def build(
    sources: Mapping[str, str],
    out_dir: str | os.PathLike[str],
    *,
    isa: str = "native",
    flags: Sequence[str] = (),
    jobs: int | None = None,
) -> dict[str, Path]:
    """Compile kernels; returns, for each name of `sources`, the shared object that holds its function.

    Equal sources compile once; sources already built in `out_dir` are not built again. The rest is dealt to `jobs` groups
    (default: the CPUs this process may use), one compiler process and one shared object per group, so function names must
    differ between distinct sources. Safe to call from several processes on one `out_dir`.
    Raises NoCompiler, and KernelBuildFailed with the compiler's output.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    parts = toolchain(isa, flags)
    hashes = {name: _hash(parts, source) for name, source in sources.items()}
    missing = {h: sources[n] for n, h in sorted(hashes.items()) if not (out / f"{h}.so").exists()}
    jobs = jobs or len(os.sched_getaffinity(0))
    groups = deal(missing, jobs)
    side_by_side(lambda group: _build_group(group, out, isa, flags), groups, len(groups))
    return {name: (out / f"{h}.so").resolve() for name, h in hashes.items()}


A = TypeVar("A")
B = TypeVar("B")


def side_by_side(do: Callable[[A], B], work: Sequence[A], at_once: int) -> list[B]:
    """What `do` makes of each piece of work, `at_once` at a time; raises the first error once all have ended.

    The threads are daemons. A process waits at its end for those of a pool, and so for compilers whose kernels nobody wants
    any more; what a thread of the caller's waits for is waited for all the same.
    """
    todo, made, errors = deque(enumerate(work)), dict[int, B](), list[BaseException]()

    def some() -> None:
        while todo:
            try:
                i, piece = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                made[i] = do(piece)
            except BaseException as error:
                errors.append(error)

    others = [threading.Thread(target=some, daemon=True) for _ in range(min(at_once, len(work)) - 1)]
    for thread in others:
        thread.start()
    some()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
    return [made[i] for i in range(len(work))]


def deal(sources: Mapping[str, str], groups: int) -> list[dict[str, str]]:
    """Split into at most `groups` parts of about equal text, longest source first."""
    parts: list[dict[str, str]] = [{} for _ in range(min(groups, len(sources)))]
    for name in sorted(sources, key=lambda n: (-len(sources[n]), n)):
        min(parts, key=lambda p: sum(map(len, p.values())))[name] = sources[name]
    return parts


def _build_group(group: Mapping[str, str], out: Path, isa: str, flags: Sequence[str]) -> None:
    """One shared object for `group` (hash -> source), and a link to it under each hash."""
    for h, source in group.items():
        _write(out / f"{h}.cpp", source)
    name = hashlib.sha256("".join(group).encode()).hexdigest()[:32]
    unit = out / f"group-{name}.cpp"
    _write(unit, "".join(f'#include "{h}.cpp"\n' for h in group))
    target = unit.with_suffix(".so")
    scratch = out / f"group-{name}.{os.getpid()}.tmp"
    argv = [*command(isa, flags), "-o", str(scratch), str(unit), "-lm"]
    run = subprocess.run(argv, capture_output=True, text=True)
    if run.returncode != 0:
        raise KernelBuildFailed(source=str(unit), compiler=argv[0], output=run.stderr[-4000:], command=shlex.join(argv))
    os.replace(scratch, target)
    for h in group:
        link = out / f"{h}.{os.getpid()}.link"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        os.replace(link, out / f"{h}.so")


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)
