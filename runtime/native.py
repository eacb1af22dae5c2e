"""The native runner: building, loading and calling it. It needs no torch headers and no state.

`runner.cpp` is one generic function, so one shared object serves every plan of a machine; see its head for the program
format. A machine without a C++ compiler gets it from an artifact.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import GuardFailed, KernelBuildFailed, NoCompiler, SizeFailed

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("runner.cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared")
PROBE = 1 << 20
"""Bytes written to find out whether a disk is full."""
_WHY = {
    -1: "division by zero or a negative power",
    -2: "a size leaves the range of 64-bit integers",
    -3: "the native program is malformed",
}
END, EVAL, GUARD, LAUNCH = range(4)


def find_compiler() -> str | None:
    """The C++ compiler of this machine: `CXX`, else one of COMPILERS; None without one."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else COMPILERS) if (found := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where native binaries of this user are kept: `native` in `PLAIT_CACHE_DIR` or in the user's cache folder for plait.

    The folder is private (0700). Where none can be written, one that lives as long as the process.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.environ.get("PLAIT_CACHE_DIR") or os.path.join(base, "plait")) / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError as error:
        log.debug("no cache folder: %s", error)
    return _process_folder()


@functools.cache
def _process_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="plait-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def refusal(folder: Path) -> str | None:
    """Why `folder` takes no new files right now, a full disk for example; None where it takes them."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def keep(name: str, make: Callable[[Path], object], good: Callable[[Path], bool] = Path.exists) -> Path:
    """The file `name` in the cache folder; `make(path)` puts it there unless a `good` one is there already.

    Where the folder takes no files, as on a full disk, the file is made in a folder that lives as long as the process. What
    `make` raises otherwise passes through.
    """
    path = cache_folder() / name
    if good(path):
        return path
    try:
        make(path)
    except (OSError, KernelBuildFailed):  # a full disk fails a compiler too
        why = refusal(path.parent)
        if why is None or path.parent == _process_folder():
            raise
        log.info("%s takes no files (%s): %s is kept for this process only", path.parent, why, name)
        path = _process_folder() / name
        if not good(path):
            make(path)
    return path


def build_shared(
    sources: Sequence[str], target: Path, flags: Sequence[str] = FLAGS, headers: Mapping[str, str] | None = None
) -> Path:
    """Compile C++ texts into the shared object `target`, atomically. `headers` are files that they may include.

    Raises NoCompiler, or KernelBuildFailed with the compiler's output.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoCompiler(tried=os.environ.get("CXX") or ", ".join(COMPILERS))
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        texts = {f"unit{i}.cpp": text for i, text in enumerate(sources)}
        for name, text in {**texts, **(headers or {})}.items():
            Path(folder, name).write_text(text)
        command = [compiler, *texts, "-o", "out.so", *flags, "-I."]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            shown = " ".join(command)
            raise KernelBuildFailed(compiler=compiler, source=target.stem, output=done.stderr[-4000:], command=shown)
        os.replace(Path(folder, "out.so"), target)
    return target


class Runner:
    """A loaded `runner.cpp`. `run(program, bases, slots, nthreads, times)` takes addresses and returns the status."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.run = library.plait_run  # a CDLL releases the interpreter lock while kernels run
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.run.restype = ctypes.c_int64


@functools.cache
def default_runner() -> Runner:
    """The runner of this machine, compiled into the cache folder when it is not there yet."""
    source = SOURCE.read_text()
    key = hashlib.sha256("\0".join([source, *FLAGS]).encode()).hexdigest()[:16]
    path = keep(f"runner-{key}.so", lambda path: build_shared([source], path))
    return Runner(ctypes.CDLL(str(path)))


class Program:
    """An int64 program for the runner, and the address of its first word."""

    def __init__(self) -> None:
        self._words = array("q")
        self.launches = 0

    def evaluate(self, instructions: Iterable[tuple[int, int, int, int]]) -> None:
        """Append a slot program."""
        for instruction in instructions:
            self._words.extend((EVAL, *instruction))

    def guard(self, slot: int, index: int) -> None:
        """Append: stop unless slot `slot` is non-zero; `index` names the guard."""
        self._words.extend((GUARD, slot, index))

    def launch(self, function: int, buffers: Sequence[tuple[int, int]], sizes: Sequence[int]) -> None:
        """Append a kernel call; `buffers` are (base, offset slot) pairs, `sizes` slots."""
        self._words.extend((LAUNCH, function, len(buffers), len(sizes)))
        for pair in buffers:
            self._words.extend(pair)
        self._words.extend(sizes)
        self.launches += 1

    def seal(self) -> int:
        """Append the end and return the address; nothing may be appended afterwards. The program must be kept alive."""
        self._words.append(END)
        return self._words.buffer_info()[0]


def raise_status(status: int, messages: Sequence[str]) -> None:
    """Turn a non-zero status of the runner into its error; `messages` are the guards' texts."""
    if status > 0:
        raise GuardFailed(message=messages[status - 1])
    raise SizeFailed(why=_WHY[status])
