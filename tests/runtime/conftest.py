import ctypes
import subprocess

import pytest
import torch

from tests.runtime.kit import ACCESS, SOURCE


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Name -> address of the kernels in kit.py."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "k.cpp").write_text(SOURCE)
    flags = ["-O2", "-fPIC", "-shared", "-fopenmp"]
    subprocess.run(["g++", *flags, str(folder / "k.cpp"), "-o", str(folder / "k.so")], check=True)
    library = ctypes.CDLL(str(folder / "k.so"))
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ACCESS}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
