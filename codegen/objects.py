"""Which functions the cache's entries of kinds "kernel" and "objects" stand for. Needs no torch."""

from __future__ import annotations

from contextlib import suppress

from .cache import Cache, Entry, Key

WHERE = "objects.txt"
"""The file of a "kernel" entry: the part `kernels` of the objects' key, and the function's name."""


def object_key(kernel: Entry) -> Key:
    """The key of the "objects" entry that holds the function of a "kernel" entry. Raises OSError for one that is gone."""
    parts = {name: text for name, text in kernel.key.parts if name != "source"}
    return Key.of("objects", kernels=where(kernel)[0], **parts)


def functions(cache: Cache) -> dict[str, list[str]]:
    """Names of the functions that entries of kinds "kernel" and "objects" stand for, by the entry's digest."""
    found: dict[str, list[str]] = {}
    for kernel in cache.entries("kernel"):
        with suppress(OSError, KeyError):
            for digest in (kernel.key.digest, object_key(kernel).digest):
                found.setdefault(digest, []).append(where(kernel)[1])
    return {digest: sorted(names) for digest, names in found.items()}


def where(kernel: Entry) -> tuple[str, str]:
    """(the part `kernels` of the objects' key, the function's name) of a "kernel" entry."""
    digest, _, name = kernel.read(WHERE).decode().partition(" ")
    return digest, name
