"""The recording part in C++, built once for a machine and a Python; in Python where that cannot be done."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelBuildFailed, NoCompiler
from ...runtime.native import FLAGS, build_shared, keep
from . import record_python

log = logging.getLogger(__name__)

NAME = "plait_record"
SOURCES = ("record.cpp", "launch.cpp", "tasks.cpp")
HEADERS = ("state.h",)
FUNCTIONS = (  # torch's, which native code calls: (library, name)
    ("c10", "_ZN3c108GradMode10is_enabledEv"),  # c10::GradMode::is_enabled()
    ("c10", "_ZN3c108GradMode11set_enabledEb"),  # c10::GradMode::set_enabled(bool)
    ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS18get_disabled_stateEv"),  # at::impl::PythonTorchFunctionTLS
    ("torch_cpu", "_ZN2at4impl22PythonTorchFunctionTLS18set_disabled_stateENS0_26TorchFunctionDisabledStateE"),
    ("torch_cpu", "_ZN2at8autocast19is_autocast_enabledEN3c1010DeviceTypeE"),
)


def load() -> tuple[Any, str]:
    """(a module with Handle, Table, State, Tasks, Quick and enter, why it is not the native one). Python's Quick is None."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        return _python(f"Python's headers are not in {include}")
    here = Path(__file__).parent
    texts = [(here / name).read_text() for name in SOURCES]
    headers = {name: (here / name).read_text() for name in HEADERS}
    flags = (*FLAGS, "-O3", f"-I{include}")
    key = hashlib.sha256("\n".join((*texts, *headers.values(), sys.version, *flags)).encode()).hexdigest()[:24]
    try:
        path = keep(f"record-{key}.so", lambda target: build_shared(texts, target, flags, headers))
        spec: Any = importlib.util.spec_from_file_location(NAME, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.begin(*map(_address, FUNCTIONS))
    except (NoCompiler, KernelBuildFailed, OSError, ImportError, AttributeError) as why:
        return _python(str(why).split("\n")[0])
    return module, ""


def _address(function: tuple[str, str]) -> int | None:
    """Where one of torch's functions is. Raises OSError, AttributeError."""
    library, name = function
    found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"lib{library}.so"))
    return ctypes.cast(getattr(found, name), ctypes.c_void_p).value


def _python(why: str) -> tuple[Any, str]:
    log.warning("autobatch records in Python, which takes several times as long: %s", why)
    return record_python, why


record, WHY_NOT_NATIVE = load()
