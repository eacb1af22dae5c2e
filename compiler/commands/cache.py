"""`plait cache`: look at and clean the disk cache."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import click

from ...codegen.cache import STALE, Cache, Entry
from ...codegen.objects import functions, object_key
from ...errors import NoCacheEntry
from ...runtime.native import cache_folder
from ..terminal import emit, fields, size, table
from .shared import common

SHOWN = 3
"""Functions named on a line of a list."""


@click.group()
def cache() -> None:
    """Look at and clean the disk cache."""


@cache.command("path")
@common
def cache_path(as_json: bool) -> None:
    """Print the cache's folder."""
    found = Cache()
    emit({"path": str(found.root), "off": found.off}, as_json, lambda: str(found.root))


@cache.command("ls")
@click.option("--kind", default=None, help="Only entries of this kind (kernel, objects, graph).")
@common
def cache_ls(kind: str | None, as_json: bool) -> None:
    """List entries, most recently used first."""
    store = Cache()
    entries, names = store.entries(kind), functions(store)
    rows = [
        (e.key.digest[:12], e.key.kind, e.size, time.strftime("%F %T", time.localtime(e.used)), _brief(e, names))
        for e in entries
    ]

    def render() -> str:
        total = f"{len(entries)} entries, {size(sum(e.size for e in entries))}"
        return f"{table(('digest', 'kind', 'bytes', 'last used', 'key'), rows)}\n{total}" if rows else total

    data = [
        {"digest": e.key.digest, "kind": e.key.kind, "bytes": e.size, "used": e.used, "key": dict(e.key.parts)}
        | ({"functions": names[e.key.digest]} if e.key.digest in names else {})
        for e in entries
    ]
    emit(data, as_json, render)


def _brief(entry: Entry, names: Mapping[str, Sequence[str]]) -> str:
    """The functions that an entry stands for, else short parts of its key, for a line of a list."""
    held = names.get(entry.key.digest, ())
    if any(held):
        return ", ".join(held[:SHOWN]) + (f" and {len(held) - SHOWN} more" if len(held) > SHOWN else "")
    return ", ".join(f"{n} {v}" for n, v in entry.key.parts if v and len(v) <= 40 and not v.startswith("sha256:"))


@cache.command("verify")
@common
def cache_verify(as_json: bool) -> None:
    """Check every entry's checksums and remove the damaged ones. Exit code 1 where there were any."""
    bad = Cache().verify()
    data = [{"digest": d, "damage": why} for d, why in bad]
    emit(data, as_json, lambda: "\n".join(f"removed {d[:12]}: {why}" for d, why in bad) or "all entries are whole")
    sys.exit(1 if bad else 0)


@cache.command("prune")
@click.option("--limit", type=click.IntRange(min=0), default=0, show_default=True, metavar="BYTES", help="Bytes to keep.")
@common
def cache_prune(limit: int, as_json: bool) -> None:
    """Remove least recently used entries until at most BYTES are left (0: all, and binaries that artifacts unpacked)."""
    gone = Cache().prune(limit, grace=0.0)
    unpacked = _remove_unpacked() if limit == 0 else []
    data = {"removed": len(gone) + len(unpacked), "bytes": sum(e.size for e in gone) + sum(unpacked)}
    emit(data, as_json, lambda: f"removed {data['removed']} entries, {size(data['bytes'])}")


def _remove_unpacked() -> list[int]:
    """Remove what `runtime.native` keeps: the runner, and binaries of loaded artifacts. Returns their sizes.

    Processes that have them loaded keep them; others unpack or build them again.
    """
    removed: list[int] = []
    for path in cache_folder().iterdir():
        with suppress(OSError):
            if path.suffix != ".so":  # what is being built, or was when its process died
                if time.time() - path.stat().st_mtime > STALE:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
                continue
            count = path.stat().st_size
            path.unlink()
            removed.append(count)
    return removed


@cache.command("explain")
@click.argument("prefix")
@common
def cache_explain(prefix: str, as_json: bool) -> None:
    """Show what the entry whose digest starts with PREFIX depends on, and how the nearest other entry differs."""
    store = Cache()
    found = [e for e in store.entries() if e.key.digest.startswith(prefix)]
    if len(found) != 1:
        raise NoCacheEntry(prefix=prefix, count=len(found) or "no")
    entry = found[0]
    near = store.nearest(entry.key)
    differs = {n: dict(near.key.parts).get(n) for n in entry.key.differs(near.key)} if near is not None else {}
    data = {
        "digest": entry.key.digest,
        "kind": entry.key.kind,
        "key": dict(entry.key.parts),
        "files": dict(entry.files),
        **_functions(store, entry),
        "nearest": None if near is None else near.key.digest,
        "differs": differs,
    }
    emit(data, as_json, lambda: fields(data))


def _functions(store: Cache, entry: Entry) -> dict[str, Any]:
    """Of entries of kinds "kernel" and "objects": the functions, and where a kernel's function is."""
    names = functions(store).get(entry.key.digest)
    found: dict[str, Any] = {} if names is None else {"functions": ", ".join(names)}
    if entry.key.kind == "kernel" and names is not None:
        key = object_key(entry)
        there = any(e.key == key for e in store.entries("objects"))
        found["objects"] = key.digest if there else "gone: built again when the kernel is asked for"
    return found
