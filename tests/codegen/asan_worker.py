"""Runs kernels that were built with AddressSanitizer; started with its library preloaded, and without torch.

The argument is a JSON file: a list of [library, function, buffer files, sizes, threads]. Every buffer is an allocation of
exactly its bytes, so that the first byte past it is poisoned; results are written back to the files.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

for library, function, files, sizes, threads in json.loads(Path(sys.argv[1]).read_text()):
    contents = [Path(f).read_bytes() for f in files]
    addresses = [libc.malloc(len(c)) for c in contents]
    for address, content in zip(addresses, contents, strict=True):
        ctypes.memmove(address, content, len(content))
    bufs = (ctypes.c_void_p * len(files))(*addresses)
    numbers = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
    getattr(ctypes.CDLL(library), function)(bufs, numbers, ctypes.c_int(threads))
    for address, content, f in zip(addresses, contents, files, strict=True):
        Path(f).write_bytes(ctypes.string_at(address, len(content)))
        libc.free(address)
