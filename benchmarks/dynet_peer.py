"""DyNet as a peer, built from its source distribution for this machine, in an environment of its own under build/dynet.

It needs a C++ compiler, cmake and Eigen's headers (Debian: libeigen3-dev), and a package index for the source. Building
takes minutes, once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .environments import NoPeer
from .machine import ROOT

FOLDER = ROOT / "build" / "dynet"
PROGRAMS = Path(__file__).with_name("dynet")
VERSION = "2.1.2"
STRATEGIES = (1, 2)  # by agenda and by depth; the third, a mixture, crashes in some of the programs
EIGEN = ("/usr/include/eigen3", "/usr/local/include/eigen3", "/opt/homebrew/include/eigen3")


def is_built() -> bool:
    """Whether DyNet is there already: building takes minutes."""
    return (FOLDER / "done").exists()


def build() -> Path:
    """The folder with DyNet, built if it is not there. Raises NoPeer."""
    if is_built():
        return FOLDER
    eigen = next((p for p in (os.environ.get("EIGEN3_INCLUDE_DIR", ""), *EIGEN) if p and Path(p).is_dir()), None)
    compiler = shutil.which("g++")
    missing = [what for what, found in (("g++", compiler), ("cmake", shutil.which("cmake")), ("Eigen", eigen)) if not found]
    if missing:
        raise NoPeer(f"DyNet is not built without {', '.join(missing)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    python = FOLDER / "venv" / "bin" / "python"
    _run([sys.executable, "-m", "venv", FOLDER / "venv"])
    _run([python, "-m", "pip", "install", "-q", "setuptools<70", "wheel", "cython<3", "numpy"])
    source = ["--no-deps", "--no-binary", ":all:", f"dynet=={VERSION}"]
    _run([python, "-m", "pip", "download", "-q", *source], env=_path(python.parent))
    with tarfile.open(FOLDER / f"dyNET-{VERSION}.tar.gz") as archive:
        archive.extractall(FOLDER, filter="data")
    root = FOLDER / f"dyNET-{VERSION}"
    made = root / "build" / "cpp"
    made.mkdir(parents=True, exist_ok=True)
    _run(["cmake", "../..", f"-DEIGEN3_INCLUDE_DIR={eigen}", "-DCMAKE_BUILD_TYPE=Release"], cwd=made)
    _run(["make", f"-j{os.cpu_count() or 1}", "dynet"], cwd=made)
    _extension(root, python, str(eigen))
    flags = ["-std=c++11", "-O2", "-march=native", "-fpermissive", "-w", f"-I{root}", f"-I{eigen}"]
    _run(["g++", *flags, PROGRAMS / "treelstm.cpp", *_link(root), "-o", FOLDER / "treelstm"])
    (FOLDER / "done").touch()
    return FOLDER


def _extension(root: Path, python: Path, eigen: str) -> None:
    """DyNet's Python module."""
    folder = root / "python"
    _run([python, "-m", "cython", "--cplus", "_dynet.pyx"], cwd=folder)
    include = sysconfig.get_paths()["include"]
    headers = subprocess.check_output([python, "-c", "import numpy; print(numpy.get_include())"], text=True).strip()
    flags = [
        "-std=c++11",
        "-O2",
        "-shared",
        "-fPIC",
        "-fpermissive",
        "-w",
        "-I..",
        f"-I{eigen}",
        f"-I{headers}",
        f"-I{include}",
    ]
    _run(["g++", *flags, "_dynet.cpp", *_link(root), "-o", "_dynet.so"], cwd=folder)
    (folder / "dynet.py").write_text((folder / "dynet.py.in").read_text().replace("${HAVE_CUDA}", "False"))


def _link(root: Path) -> list[str]:
    library = root / "build" / "cpp" / "dynet"
    return [f"-L{library}", "-ldynet", f"-Wl,-rpath,{library}"]


def _path(first: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{first}{os.pathsep}{os.environ['PATH']}"}


def _run(command: list[Any], cwd: Path = FOLDER, env: dict[str, str] | None = None) -> None:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoPeer(f"{command[0]} failed while DyNet was built: {done.stderr.strip().splitlines()[-1:]}")


class Worker:
    """A process that builds and runs the next batch whenever it is told how."""

    def __init__(self, command: list[Any], environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def run(self, how: str) -> tuple[float, float]:
        """(seconds, sum of the results). Raises NoPeer where the process has ended."""
        *_, seconds, value = self.lines(how)[-1].split()
        return float(seconds), float(value)

    def lines(self, how: str) -> list[str]:
        """What it prints for one run; the last line has the seconds and the sum."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(how + "\n")
        self.process.stdin.flush()
        found: list[str] = []
        for line in self.process.stdout:
            found.append(line)
            if line.startswith("RAN "):
                return found
        raise NoPeer(f"DyNet ended with code {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def native_trees(folder: Path, hidden: int, words: int, batches: Iterable[Iterable[Any]]) -> Worker:
    """The TreeLSTM in DyNet's C++ API, on trees that are nested lists of two, words their numbers."""
    lines = []
    for batch in batches:
        trees = [" ".join(map(str, _postfix(t))) for t in batch]
        lines += [str(len(trees)), *trees]
    path = folder / f"trees-{hidden}.txt"
    path.write_text("\n".join(lines) + "\n")
    return Worker([build() / "treelstm", hidden, words, path, "--dynet-mem", "2000"])


def _postfix(t: Any) -> list[int]:
    return [*_postfix(t[0]), *_postfix(t[1]), -1] if isinstance(t, list) else [t]


def python_model(
    folder: Path, name: str, hidden: int, strategy: int, model: nn.Module, batches: Any, *, profile: bool = False
) -> Worker:
    """A model in DyNet's Python API with the parameters of a torch model, on instances as JSON holds them."""
    root = build()
    weights, given = folder / f"{name}-{hidden}.npz", folder / f"{name}-{hidden}.json"
    np.savez(weights, **{k: p.detach().numpy() for k, p in model.named_parameters()})
    given.write_text(json.dumps(batches))
    command = [root / "venv" / "bin" / "python", PROGRAMS / "models.py", name, hidden, strategy, weights, given]
    path = {"PYTHONPATH": str(root / f"dyNET-{VERSION}" / "python")}
    return Worker([*command, *(["profile"] if profile else [])], path)
