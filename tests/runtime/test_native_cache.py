"""Where native binaries are kept when the cache folder takes no files."""

import errno
import logging
import subprocess

import pytest
import torch
from plait.errors import KernelBuildFailed
from plait.runtime import native
from plait.runtime.artifact import load


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setattr(native, "refusal", lambda folder: "No space left on device")


def failing(cache, error):
    """A way to make a file that fails in the cache folder, and the paths that it was asked for."""
    asked = []

    def make(path):
        asked.append(path)
        if path.parent == cache:
            raise error
        path.write_bytes(b"made")

    return make, asked


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KernelBuildFailed(compiler="g++", source="x", output="", command="")],
)
def test_on_a_full_disk_files_are_made_for_the_process(cache, full, error, caplog):
    caplog.set_level(logging.INFO)
    make, asked = failing(cache, error)
    path = native.keep(f"{type(error).__name__}.so", make)
    assert path.read_bytes() == b"made" and [p.parent for p in asked] == [cache, path.parent]
    assert "takes no files (No space left on device)" in caplog.text
    assert native.keep(path.name, make) == path and len(asked) == 3  # tried again, made once


def test_other_errors_pass_through(cache):
    make, asked = failing(cache, OSError(errno.EIO, "broken"))
    with pytest.raises(OSError, match="broken"):
        native.keep("x.so", make)
    assert len(asked) == 1


def test_a_file_that_is_good_is_not_made_again(cache):
    first = native.keep("y.so", lambda path: path.write_bytes(b"1"))
    assert native.keep("y.so", lambda path: pytest.fail("made again")) == first
    again = native.keep("y.so", lambda path: path.write_bytes(b"2"), lambda path: False)
    assert again == first and first.read_bytes() == b"2"


def test_the_runner_and_an_artifact_on_a_full_disk(tmp_path, monkeypatch, path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of a given size needs the right to mount")
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(small))
    native.default_runner.cache_clear()
    try:
        assert native.default_runner().run
        assert load(path)(torch.ones(8)).tolist() == [2.0 * (1 + i) for i in range(8)]
        assert list((small / "native").iterdir()) == []
    finally:
        native.default_runner.cache_clear()
        subprocess.run(["umount", "-l", str(small)], check=True)
