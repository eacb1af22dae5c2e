"""Building shared objects: once per distinct source, side by side, for named instruction sets, with errors that help."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from plait.codegen.cpp import build as building
from plait.codegen.cpp.build import ISAS, build, compiler, compiler_version, content_hash, host_isa
from plait.errors import KernelBuildFailed, NoCompiler


def returning(name: str, value: int) -> str:
    return f'extern "C" int {name}() {{ return {value}; }}\n'


def result(path: Path, name: str) -> int:
    return getattr(ctypes.CDLL(str(path)), name)()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler runs that the test causes."""
    seen: list[list[str]] = []
    run = subprocess.run

    def spy(argv, **options):
        seen.append(argv)
        return run(argv, **options)

    compiler_version()
    monkeypatch.setattr(building.subprocess, "run", spy)
    return seen


def test_every_name_gets_its_function(tmp_path: Path) -> None:
    built = build({f"f{i}": returning(f"f{i}", i) for i in range(5)}, tmp_path, jobs=2)
    assert [result(built[f"f{i}"], f"f{i}") for i in range(5)] == list(range(5))
    assert len(set(built.values())) == 2


def test_equal_sources_compile_once(tmp_path: Path, commands) -> None:
    built = build({"a": returning("f", 1), "b": returning("f", 1)}, tmp_path)
    assert built["a"] == built["b"]
    assert len(commands) == 1


def test_what_is_built_is_not_built_again(tmp_path: Path, commands) -> None:
    first = build({"a": returning("f", 1), "b": returning("g", 2)}, tmp_path, jobs=1)
    assert build({"b": returning("g", 2)}, tmp_path)["b"] == first["b"]
    assert len(commands) == 1
    build({"b": returning("g", 2), "c": returning("h", 3)}, tmp_path)
    assert len(commands) == 2


def test_hash_covers_source_flags_and_instruction_set() -> None:
    source = returning("f", 1)
    hashes = [content_hash(source), content_hash(source + " "), content_hash(source, flags=("-g",)),
              content_hash(source, "x86-64-v3"), content_hash(source, "x86-64-v4")]  # fmt: skip
    assert len(set(hashes)) == 5
    assert content_hash(source) == hashes[0]


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.startswith("x86-64")])
def test_kernel_builds_for_artifacts(isa: str, tmp_path: Path) -> None:
    if not host_isa().startswith("x86-64"):
        pytest.skip("the compiler targets another architecture")
    source = '#include "vmath.h"\nextern "C" float f(float x) { return plait::exp(x); }\n'
    assert build({"f": source}, tmp_path, isa=isa)["f"].exists()


def test_kernel_builds_for_another_architecture(tmp_path: Path) -> None:
    if host_isa() == "aarch64" or shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("needs the aarch64 cross compiler on another machine")
    source = '#include "vmath.h"\nextern "C" float f(float x) { return plait::tanh(x); }\n'
    built = build({"f": source}, tmp_path, isa="aarch64")["f"]
    assert built.read_bytes()[18:20] == b"\xb7\x00"  # ELF machine: AArch64


def test_host_instruction_set_is_known() -> None:
    assert host_isa() in (*ISAS, "x86-64")


def test_refused_source_is_reported_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(KernelBuildFailed, match=r"(?s)no_such_name.*-std=c\+\+17"):
        build({"f": 'extern "C" int f() { return no_such_name; }'}, tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NoCompiler, match="no-such-compiler"):
        build({"f": returning("f", 1)}, tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    if host_isa() != "aarch64":
        with pytest.raises(NoCompiler, match="aarch64-linux-gnu-g"):
            compiler("aarch64")


def test_compiler_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = compiler()
    monkeypatch.setenv("CXX", chosen)
    assert compiler() == chosen
