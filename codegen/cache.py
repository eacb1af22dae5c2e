"""Disk cache of build results, keyed by content: built kernels and whole compiled graphs.

It lies below the compiler because both the kernel builder and the compiler use it. An entry is a folder of files plus
`entry.json`, which holds the parts of its key and a checksum of every file:

    <root>/v3/<kind>/<digest>/entry.json, plan.json, kernels.so, ...

Entries are made in a temporary folder and appear by one rename, so that a reader never sees half of one. A per-key lock
lets the second of two processes wait for the first instead of building the same thing again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import filelock
import platformdirs

from .. import config
from ..runtime.native import refusal

log = logging.getLogger(__name__)

FORMAT = "v3"
LIMIT = 4 << 30
"""Default size cap in bytes."""
GRACE = 60.0
"""Seconds for which an entry that was just used is safe from eviction: its reader may not have opened its files yet."""
LONG = 120
"""Parts of a key longer than this many characters are kept as their hash."""
ENTRY = "entry.json"
STALE = 3600.0
"""Seconds after which temporary folders and locks are what crashed writers left behind."""
OURS = ("tmp", "locks")
"""Folders beside those of the kinds."""


def sha256(data: bytes | str) -> str:
    """Hex digest of bytes or of a text's UTF-8 bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def default_root() -> Path:
    """The setting `cache_dir` (environment variable PLAIT_CACHE_DIR), else the user's cache folder."""
    return Path(config.current().cache_dir or platformdirs.user_cache_dir("plait", appauthor=False))


@dataclass(frozen=True)
class Key:
    """What an entry depends on, as named parts. `kind` is the folder ("kernel", "objects", "graph").

    Parts keep their names so that a miss can say which of them differs from the nearest entry.
    """

    kind: str
    parts: tuple[tuple[str, str], ...]

    @staticmethod
    def of(kind: str, **parts: str) -> Key:
        """A key from named texts; long ones are replaced by their hash."""
        return Key(kind, tuple(sorted((k, v if len(v) <= LONG else f"sha256:{sha256(v)}") for k, v in parts.items())))

    @cached_property
    def digest(self) -> str:
        """Content address: 40 hex digits over kind and parts."""
        return sha256(json.dumps([FORMAT, self.kind, self.parts]))[:40]

    def differs(self, other: Key) -> tuple[str, ...]:
        """Names of the parts in which two keys differ, sorted."""
        a, b = dict(self.parts), dict(other.parts)
        return tuple(sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n)))


@dataclass(frozen=True)
class Entry:
    """A stored result: its key, the folder it lies in and its files (name to size in bytes)."""

    key: Key
    folder: Path
    files: Mapping[str, int]
    used: float = 0.0

    def path(self, name: str) -> Path:
        """Where the file `name` lies. Raises KeyError for a name that the entry does not have."""
        self.files[name]
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The content of the file `name`."""
        return self.path(name).read_bytes()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Miss:
    """Nothing usable is stored for `key`; `damage` says so where an entry was there but broken."""

    key: Key
    cache: Cache = field(repr=False)
    damage: str | None = None

    def explain(self) -> str:
        """Why this is a miss, in words: what the nearest entry has otherwise. Reads every entry of the kind."""
        if self.damage:
            return f"the entry was damaged ({self.damage}) and has been removed"
        near = self.cache.nearest(self.key)
        if near is None:
            return f"there is no other entry of kind {self.key.kind!r}"
        old, new = dict(near.key.parts), dict(self.key.parts)
        changes = [f"{n}: {old.get(n, 'absent')} there, {new.get(n, 'absent')} here" for n in self.key.differs(near.key)]
        return f"the nearest entry {near.key.digest[:12]} differs in {'; '.join(changes)}"


class Cache:
    """Entries below one folder. Safe for several threads and processes; never the reason why a compilation fails.

    root: folder (default: `default_root()`). limit: bytes; above it the least recently used entries go.
    Where the folder cannot be written, results live in a private temporary folder of this object and a warning is logged
    once. A folder that somebody else owns or may write to is not used at all, because kernels from it would be run.
    """

    def __init__(self, root: str | Path | None = None, *, limit: int = LIMIT) -> None:
        self.root = Path(root) if root is not None else default_root()
        self.limit = limit
        self.base = self.root / FORMAT
        self._why_off: str | None = None
        self._private: tempfile.TemporaryDirectory[str] | None = None
        self._making_private = threading.Lock()
        self._known_size: int | None = None
        self._prepare()

    # -- reading

    def get(self, key: Key) -> Entry | Miss:
        """The entry for `key`, its checksums verified, or why there is none. A damaged entry is removed with a warning."""
        found = self._find(key)
        if isinstance(found, Entry):
            with suppress(OSError):
                os.utime(found.folder / ENTRY)
        return found

    def _find(self, key: Key) -> Entry | Miss:
        for folder in self._places(key):
            try:
                entry = _load(folder)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                return self._discard(folder, key, str(error))
            if entry.key != key:
                return self._discard(folder, key, "it belongs to another key")
            damage = _damage(entry)
            if damage and folder.exists():  # else another process pruned it just now
                return self._discard(folder, key, damage)
            if damage is None:
                return entry
        return Miss(key, self)

    def _places(self, key: Key) -> Iterator[Path]:
        if self._private is not None:
            yield Path(self._private.name) / key.kind / key.digest
        if self.trusted:
            yield self.base / key.kind / key.digest

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Every readable entry (of one kind), most recently used first. Checksums are not verified."""
        found: list[Entry] = []
        if self.trusted:
            for manifest in self.base.glob(f"{kind or '*'}/*/{ENTRY}"):
                if manifest.parent.parent.name in OURS:  # not published yet, or on its way out
                    continue
                with suppress(OSError, ValueError):
                    found.append(_load(manifest.parent))
        return sorted(found, key=lambda e: (-e.used, e.key.digest))

    def nearest(self, key: Key) -> Entry | None:
        """The entry of the same kind whose key differs in the fewest parts (not `key` itself), None where there is none."""
        others = [e for e in self.entries(key.kind) if e.key != key]
        return min(others, key=lambda e: len(key.differs(e.key)), default=None)

    def verify(self) -> list[tuple[str, str]]:
        """Check every entry, remove the damaged ones. Returns (digest, what was wrong) of those."""
        bad: list[tuple[str, str]] = []
        for folder in sorted(self.base.glob("*/*")) if self.trusted else []:
            if folder.parent.name in OURS or not folder.is_dir():
                continue
            try:
                entry = _load(folder)
                why = _damage(entry)
                if why is None and entry.key.digest != folder.name:
                    why = "it belongs to another key"
            except (OSError, ValueError) as error:
                why = str(error)
            if why:
                bad.append((folder.name, why))
                self._remove(folder)
        return bad

    # -- writing

    def put(self, key: Key, files: Mapping[str, bytes]) -> Entry:
        """Store `files` under `key` and return the entry; an entry that is already there is kept."""

        def make(folder: Path) -> None:
            for name, data in files.items():
                (folder / name).write_bytes(data)

        return self.get_or_make(key, make)

    def replace(self, key: Key, files: Mapping[str, bytes]) -> Entry:
        """Like `put`, but an entry that is there with other files makes way."""
        found = self.get(key)
        if isinstance(found, Entry) and {name: found.read(name) for name in found.files} != dict(files):
            self._remove(found.folder)
        return self.put(key, files)

    def get_or_make(self, key: Key, make: Callable[[Path], None]) -> Entry:
        """The entry for `key`; where there is none, `make(folder)` writes its files into an empty folder first.

        While one process makes an entry, others that want the same one wait for it. Errors of `make` pass through.
        """
        found = self.get(key)
        if isinstance(found, Entry):
            return found
        with self._lock(key):
            again = self.get(key)
            if isinstance(again, Entry):
                return again
            log.debug("cache miss for %s %s: %s", key.kind, key.digest[:12], found.damage or "new key")
            return self._make(key, make)

    def _make(self, key: Key, make: Callable[[Path], None]) -> Entry:
        for base in self._bases():
            temporary = None
            try:
                (base / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
                temporary = Path(tempfile.mkdtemp(dir=base / "tmp"))
            except OSError as error:
                self._switch_off(error)
                continue
            try:
                make(temporary)
                return self._publish(key, temporary, base)
            except Exception as error:
                # A full disk shows as any error (of a compiler, say). Only then is the private folder worth a try, and
                # that one is the last; every other error is the caller's.
                why = refusal(temporary) if base == self.base else None
                if why is None:
                    raise
                self._switch_off(OSError(f"{self.base} takes no files: {why}"))
                log.debug("what failed for want of room: %s", error)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        raise AssertionError("the private folder is always tried last")

    def _bases(self) -> Iterator[Path]:
        if self._why_off is None:
            yield self.base
        with self._making_private:  # a second folder would take the first one, and what others build there, away
            if self._private is None:
                self._private = tempfile.TemporaryDirectory(prefix="plait-")
        yield Path(self._private.name)

    def _publish(self, key: Key, temporary: Path, base: Path) -> Entry:
        files: dict[str, dict[str, object]] = {}
        for path in sorted(temporary.iterdir()):
            data = path.read_bytes()
            files[path.name] = {"sha256": sha256(data), "size": len(data)}
        text = json.dumps({"kind": key.kind, "parts": dict(key.parts), "files": files}, indent=1)
        (temporary / ENTRY).write_text(text)
        final = base / key.kind / key.digest
        final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            temporary.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # another process was faster; both results are the same
        entry = _load(final)
        if base == self.base:
            self._account(entry.size)
        return entry

    def _account(self, added: int) -> None:
        """Keep a running total; look at the disk only at the first write and when the total passes the limit."""
        if self._known_size is None:
            self._known_size = sum(e.size for e in self.entries())
        else:
            self._known_size += added
        if self._known_size > self.limit:
            self.prune(self.limit)
            self._known_size = sum(e.size for e in self.entries())

    def prune(self, limit: int | None = None, *, grace: float = GRACE) -> list[Entry]:
        """Remove least recently used entries until at most `limit` bytes are left, and what crashed writers left behind.

        Entries used within `grace` seconds stay. Returns what was removed.
        """
        limit = self.limit if limit is None else limit
        entries = self.entries()
        total = sum(e.size for e in entries)
        gone: list[Entry] = []
        for entry in reversed(entries):
            if total <= limit:
                break
            if time.time() - entry.used >= grace and self._remove(entry.folder):
                gone.append(entry)
                total -= entry.size
        for leftover in [p for name in OURS for p in self.base.glob(f"{name}/*")] if self.trusted else ():
            with suppress(OSError):
                if time.time() - leftover.stat().st_mtime > STALE:
                    shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()
        return gone

    def _discard(self, folder: Path, key: Key, why: str) -> Miss:
        log.warning("cache entry %s is damaged (%s): removed, it will be built again", folder.name[:12], why)
        self._remove(folder)
        return Miss(key, self, why)

    def _remove(self, folder: Path) -> bool:
        """Take an entry away by a rename first, so that nobody sees half of it. False where that is not possible."""
        try:
            trash = folder.parent.parent / "tmp"
            trash.mkdir(exist_ok=True, mode=0o700)
            away = trash / f"{folder.name}-{uuid.uuid4().hex}"  # no folder of its own: a full disk has no room for one
            folder.rename(away)
        except OSError as error:
            log.debug("cannot remove cache entry %s: %s", folder, error)
            return False
        shutil.rmtree(away, ignore_errors=True)
        return True

    # -- the folder itself

    @property
    def trusted(self) -> bool:
        """Whether entries below `root` may be used: the folder is ours, and nobody else can write to it."""
        try:
            info = self.base.stat()
        except OSError:
            return False
        return info.st_uid == os.getuid() and not stat.S_IMODE(info.st_mode) & 0o022

    @property
    def off(self) -> str | None:
        """Why nothing is written to `root`, None where the cache works."""
        return self._why_off

    def _prepare(self) -> None:
        try:
            self.base.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            self._switch_off(error)
            return
        if not self.trusted:
            self._switch_off(PermissionError(f"{self.base} belongs to somebody else or others may write to it"))
        elif not os.access(self.base, os.W_OK):
            self._switch_off(PermissionError(f"{self.base} cannot be written"))

    def _switch_off(self, error: Exception) -> None:
        if self._why_off is None:
            self._why_off = str(error)
            log.warning("compiling without the disk cache: %s (set PLAIT_CACHE_DIR to a folder of your own)", error)

    @contextmanager
    def _lock(self, key: Key) -> Iterator[None]:
        """Hold the lock of one key. Without a usable lock two processes may build the same thing, which is harmless."""
        if self._why_off is not None:
            yield
            return
        path = self.base / "locks" / f"{key.digest}.lock"
        lock = filelock.FileLock(path, timeout=600)
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # filelock.Timeout is an OSError
            log.debug("no lock for cache entry %s: %s", key.digest[:12], error)
            yield
            return
        try:
            yield
        finally:
            # The entry is published by now: whoever waits on the old file, or makes a new one, finds it.
            with suppress(OSError):
                path.unlink()
            lock.release()


def _load(folder: Path) -> Entry:
    """Read `entry.json`. Raises FileNotFoundError where there is none, ValueError where it makes no sense."""
    manifest = folder / ENTRY
    data = json.loads(manifest.read_text())
    try:
        key = Key(str(data["kind"]), tuple(sorted((str(k), str(v)) for k, v in data["parts"].items())))
        files = {str(name): int(info["size"]) for name, info in data["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{ENTRY} is incomplete: {error!r}") from error
    return Entry(key, folder, files, manifest.stat().st_mtime)


def _damage(entry: Entry) -> str | None:
    """What is wrong with an entry's files, None where all checksums hold."""
    sums = json.loads((entry.folder / ENTRY).read_text())["files"]
    for name in entry.files:
        try:
            data = entry.read(name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if sha256(data) != sums[name].get("sha256"):
            return f"{name}: the checksum does not match"
    return None
