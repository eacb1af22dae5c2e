"""The disk cache: content keys, atomic entries, damage, eviction, two processes at once, folders that cannot be written."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plait.codegen import cache as cache_module
from plait.codegen.cache import Cache, Entry, Key, Miss

KEY = Key.of("kernel", source="int f() { return 1; }", isa="x86-64-v3", compiler="g++ 12.2")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_result_is_found_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert isinstance(cache.get(KEY), Miss)
    entry = cache.put(KEY, {"k.so": b"\x7fELF", "k.cpp": b"int"})
    again = Cache(tmp_path).get(KEY)
    assert isinstance(again, Entry)
    assert again.read("k.so") == b"\x7fELF"
    assert again.files == {"k.so": 4, "k.cpp": 3} and again.size == 7
    assert again.path("k.so").is_relative_to(tmp_path) and again.folder == entry.folder


def test_keys_depend_on_every_part_but_not_on_their_order() -> None:
    assert Key.of("k", a="1", b="2").digest == Key.of("k", b="2", a="1").digest
    different = [
        KEY,
        Key.of("graph", **dict(KEY.parts)),
        *(Key.of("kernel", **{**dict(KEY.parts), n: "x"}) for n, _ in KEY.parts),
    ]
    assert len({k.digest for k in different}) == len(different)


def test_long_parts_are_kept_as_their_hash() -> None:
    assert len(dict(Key.of("k", text="x" * 10_000).parts)["text"]) < 100
    assert Key.of("k", text="x" * 10_000).digest != Key.of("k", text="x" * 10_001).digest


def test_a_miss_names_the_part_that_differs(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.get(KEY)
    assert isinstance(first, Miss) and "no other entry" in first.explain()
    cache.put(KEY, {"k.so": b"1"})
    cache.put(Key.of("kernel", source="another", isa="x86-64-v4", compiler="g++ 12.2"), {"k.so": b"2"})
    miss = cache.get(Key.of("kernel", **{**dict(KEY.parts), "compiler": "g++ 13.1"}))
    assert isinstance(miss, Miss)
    text = miss.explain()
    assert KEY.digest[:12] in text and "compiler: g++ 12.2 there, g++ 13.1 here" in text and "isa" not in text


def test_the_folder_is_private(tmp_path: Path) -> None:
    Cache(tmp_path / "c").put(KEY, {"k.so": b"1"})
    assert stat.S_IMODE((tmp_path / "c" / "v3").stat().st_mode) == 0o700


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "here"))
    assert Cache().root == tmp_path / "here"


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Cache(tmp_path).put(KEY, {"k.so": b"planted"})
    (tmp_path / "v3").chmod(0o777)
    cache = Cache(tmp_path)
    assert isinstance(cache.get(KEY), Miss) and cache.entries() == []
    entry = cache.get_or_make(KEY, lambda folder: _write(folder, b"own"))
    assert entry.read("k.so") == b"own" and not entry.folder.is_relative_to(tmp_path)
    assert len(warnings(caplog)) == 1 and "others may write" in warnings(caplog)[0]


def _write(folder: Path, data: bytes) -> None:
    (folder / "k.so").write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "manifest", "key"])
def test_a_damaged_entry_is_removed_and_built_again(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    entry = cache.put(KEY, {"k.so": b"right answer"})
    path, manifest = entry.path("k.so"), entry.folder / "entry.json"
    if how == "cut":
        path.write_bytes(b"right")
    elif how == "changed":
        path.write_bytes(b"wrong answer")
    elif how == "missing":
        path.unlink()
    elif how == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(manifest.read_text().replace("g++ 12.2", "g++ 99"))
    miss = cache.get(KEY)
    assert isinstance(miss, Miss) and "damaged" in miss.explain()
    assert len(warnings(caplog)) == 1 and "damaged" in warnings(caplog)[0]
    assert not entry.folder.exists()
    assert cache.get_or_make(KEY, lambda folder: _write(folder, b"right answer")).read("k.so") == b"right answer"


def test_verify_removes_what_is_damaged_and_keeps_the_rest(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    good = cache.put(Key.of("graph", text="g"), {"plan.json": b"{}"})
    bad = cache.put(KEY, {"k.so": b"1"})
    bad.path("k.so").write_bytes(b"2")
    assert cache.verify() == [(KEY.digest, "k.so: the checksum does not match")]
    assert [e.key for e in cache.entries()] == [good.key]
    assert cache.verify() == []


def test_what_is_being_made_is_left_alone(tmp_path: Path) -> None:
    cache, seen = Cache(tmp_path), []

    def make(folder: Path) -> None:
        _write(folder, b"1")
        (folder / "entry.json").write_text('{"kind": "kernel", "parts": {}, "files": {}}')  # as just before publishing
        seen.append((cache.verify(), cache.entries(), cache.prune(0, grace=0)))

    assert cache.get_or_make(KEY, make).read("k.so") == b"1"
    assert seen == [([], [], [])] and cache.off is None


def test_locks_and_folders_of_killed_processes_are_pruned(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, {"k.so": b"1"})
    left = [cache.base / "locks" / "dead.lock", cache.base / "tmp" / "dead"]
    left[0].touch()
    left[1].mkdir()
    cache.prune()
    assert all(p.exists() for p in left)  # somebody may be at work
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    cache.prune()
    assert not any(p.exists() for p in left) and isinstance(cache.get(KEY), Entry)


def test_a_full_disk_can_be_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, {"k.so": b"1"})

    def no_room(*args: object, **how: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", no_room)
    assert len(cache.prune(0, grace=0)) == 1
    assert cache.entries() == [] and list((cache.base / "tmp").iterdir()) == []


def test_a_disk_that_fills_up_while_compiling_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "refusal", lambda folder: "No space left on device")
    cache = Cache(tmp_path)

    def make(folder: Path) -> None:
        if folder.is_relative_to(tmp_path):
            raise RuntimeError("a page\nof what\nthe linker says")
        _write(folder, b"1")

    assert cache.get_or_make(KEY, make).read("k.so") == b"1"
    assert len(warnings(caplog)) == 1 and "takes no files: No space left on device" in warnings(caplog)[0]
    assert "\n" not in warnings(caplog)[0]


def test_an_error_while_making_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"1")
        raise RuntimeError("the compiler failed")

    with pytest.raises(RuntimeError, match="the compiler failed"):
        cache.get_or_make(KEY, fail)
    assert isinstance(cache.get(KEY), Miss)
    assert list((tmp_path / "v3" / "tmp").iterdir()) == [] and list((tmp_path / "v3" / "locks").iterdir()) == []
    assert cache.off is None


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = [Key.of("kernel", source=str(i)) for i in range(4)]
    for i, key in enumerate(keys):
        entry = cache.put(key, {"k.so": bytes(1000)})
        os.utime(entry.folder / "entry.json", (time.time() - 1000 + i,) * 2)
    assert isinstance(cache.get(keys[0]), Entry)  # used now: the oldest is keys[1]
    gone = cache.prune(2000)
    assert [e.key for e in gone] == [keys[1], keys[2]]
    assert {e.key for e in cache.entries()} == {keys[0], keys[3]}


def test_the_size_cap_holds_while_entries_are_added(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=5000)
    for i in range(20):
        entry = cache.put(Key.of("kernel", source=str(i)), {"k.so": bytes(1000)})
        os.utime(entry.folder / "entry.json", (time.time() - 1000 + i,) * 2)
    sizes = sum(e.size for e in Cache(tmp_path).entries())
    assert 4000 <= sizes <= 6000  # the newest entry may lie above the cap until the next one comes


def test_an_entry_in_use_is_not_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=10)
    cache.put(KEY, {"k.so": bytes(100)})
    assert cache.prune(0) == [] and isinstance(cache.get(KEY), Entry)
    assert len(cache.prune(0, grace=0)) == 1 and isinstance(cache.get(KEY), Miss)


def test_threads_that_want_the_same_thing_make_it_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make(folder: Path) -> None:
        made.append(1)
        time.sleep(0.2)
        _write(folder, b"1")

    threads = [threading.Thread(target=cache.get_or_make, args=(KEY, make)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(made) == 1


_CHILD = """
import sys, time
from pathlib import Path
from plait.codegen.cache import Cache, Key
root, log = Path(sys.argv[1]), Path(sys.argv[2])
def make(folder):
    with log.open("a") as f:
        f.write("made\\n")
    time.sleep(0.5)
    (folder / "k.so").write_bytes(b"x" * 100_000)
while not (root.parent / "go").exists():
    time.sleep(0.005)
entry = Cache(root).get_or_make(Key.of("kernel", source="same"), make)
assert entry.read("k.so") == b"x" * 100_000
"""


def test_two_processes_that_want_the_same_thing_make_it_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "cache"), str(log)]
    children = [subprocess.Popen(command, cwd=tmp_path) for _ in range(2)]
    (tmp_path / "go").touch()
    assert [c.wait(60) for c in children] == [0, 0]
    assert log.read_text().splitlines() == ["made"]


def _as_nobody(work) -> int:
    """Run `work` in a forked child without root's right to write everywhere; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_read_only_folder_works_without_the_cache_and_says_so_once(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    Cache(root).put(KEY, {"k.so": b"stored"})
    other = Key.of("kernel", source="new")
    for path in [*root.rglob("*"), root]:
        if os.getuid() == 0:
            os.chown(path, 65534, -1)
        path.chmod(0o500 if path.is_dir() else 0o400)

    def work() -> int:
        said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("plait").addHandler(handler)
        cache = Cache(root)
        stored = cache.get(KEY)
        new = [cache.get_or_make(other, lambda folder: _write(folder, b"fresh")) for _ in range(2)]
        cache.put(Key.of("kernel", source="third"), {"k.so": b"3"})
        good = (
            isinstance(stored, Entry)
            and stored.read("k.so") == b"stored"
            and new[0].read("k.so") == b"fresh"
            and new[0].folder == new[1].folder
            and len(said) == 1
            and "without the disk cache" in said[0]
        )
        return 0 if good else 7

    with _reachable(tmp_path):
        assert _as_nobody(work) == 0


class _reachable:
    """Let another user walk down to `folder` for a while (pytest makes its folders private)."""

    def __init__(self, folder: Path) -> None:
        self.modes = {p: p.stat().st_mode for p in (folder, *folder.parents) if not p.stat().st_mode & 0o001}

    def __enter__(self) -> None:
        for path, mode in self.modes.items():
            path.chmod(mode | 0o011)

    def __exit__(self, *_: object) -> None:
        for path, mode in self.modes.items():
            path.chmod(mode)


def test_a_full_disk_works_without_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of a given size needs the right to mount")
    try:
        cache = Cache(small)
        entry = cache.put(KEY, {"k.so": bytes(600_000)})
        assert entry.size == 600_000 and not entry.folder.is_relative_to(small)
        assert isinstance(cache.get(KEY), Entry)
        cache.put(Key.of("kernel", source="2"), {"k.so": bytes(10)})
        assert len(warnings(caplog)) == 1 and "No space left" in warnings(caplog)[0]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_root_that_is_a_file_works_without_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    assert cache.put(KEY, {"k.so": b"1"}).read("k.so") == b"1"
    assert isinstance(cache.get(KEY), Entry) and cache.off is not None
    assert len(warnings(caplog)) == 1


def test_threads_that_find_no_disk_share_one_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.TemporaryDirectory

    def slowly(*args: object, **how: object) -> tempfile.TemporaryDirectory[str]:
        time.sleep(0.05)  # so that both threads are here at once
        return made(*args, **how)  # type: ignore[call-overload]

    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")  # no folder can be made there
    monkeypatch.setattr(tempfile, "TemporaryDirectory", slowly)

    def make(i: int) -> bytes:
        def build(folder: Path) -> None:
            (folder / "a").write_bytes(b"a")
            time.sleep(0.1)
            (folder / "b").write_bytes(b"b")

        return cache.get_or_make(Key.of("kernel", source=str(i)), build).read("b")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(4))) == [b"b"] * 4
