"""The recording part in C++, built once for a machine and a Python; in Python where that cannot be done."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import sysconfig
from pathlib import Path
from typing import Any

from ...errors import KernelBuildFailed, NoCompiler
from ...runtime.native import FLAGS, build_shared, keep
from . import record_python

log = logging.getLogger(__name__)

NAME = "plait_record"
SOURCE = Path(__file__).with_name("record.cpp")


def load() -> tuple[Any, str]:
    """(a module with Handle, State, Quick and enter, why it is not the native one). Quick is None in Python's."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        return _python(f"Python's headers are not in {include}")
    text = SOURCE.read_text()
    flags = (*FLAGS, f"-I{include}")
    key = hashlib.sha256("\n".join((text, sys.version, *flags)).encode()).hexdigest()[:24]
    try:
        path = keep(f"record-{key}.so", lambda target: build_shared([text], target, flags))
        spec: Any = importlib.util.spec_from_file_location(NAME, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (NoCompiler, KernelBuildFailed, OSError, ImportError) as why:
        return _python(str(why).split("\n")[0])
    return module, ""


def _python(why: str) -> tuple[Any, str]:
    log.warning("autobatch records in Python, which takes several times as long: %s", why)
    return record_python, why


record, WHY_NOT_NATIVE = load()
