import ctypes
import subprocess

import pytest
import torch
from plait.runtime import native
from plait.runtime.artifact import Parts, write
from torch.utils import _pytree as pytree

from tests.runtime.kit import ACCESS, FLAGS, SOURCE, structure, weighted


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Name -> address of the kernels in kit.py."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.cpp").write_text(SOURCE)
    flags = ["-O2", "-fPIC", "-shared", "-fopenmp"]
    subprocess.run(["g++", *flags, str(folder / "k.cpp"), "-o", str(folder / "k.so")], check=True)
    library = ctypes.CDLL(str(folder / "k.so"))
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ACCESS}


@pytest.fixture(scope="session")
def binaries(tmp_path_factory):
    """File name -> bytes of a CPU target."""
    folder = tmp_path_factory.mktemp("bin")
    built = native.build_shared([SOURCE], folder / "kernels.so", FLAGS)
    runner = native.build_shared([native.SOURCE.read_text()], folder / "runner.so")
    return {"kernels.so": built.read_bytes(), "runner.so": runner.read_bytes()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


@pytest.fixture
def parts(binaries):
    targets = dict.fromkeys(("x86-64-v3", "x86-64-v4", "aarch64"), binaries)
    return Parts(
        weighted(),
        {"w": torch.arange(8.0)},
        structure(0),
        pytree.tree_structure(0),
        graphs={"tensor": "graph main()"},
        sources={"kernels.cpp": SOURCE},
        binaries=targets,
        build=FLAGS,
        info={"versions": {"plait": "0.1.0"}, "passes": ["fold"], "coverage": {"generated": 2}},
    )


@pytest.fixture
def path(parts, tmp_path, cache):
    write(tmp_path / "m.plait", parts)
    return tmp_path / "m.plait"


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
