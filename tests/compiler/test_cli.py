"""The command line: what it prints where, its exit codes, and each command on a small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from plait.codegen.cache import Cache, Key
from plait.codegen.kernels import load_kernels
from plait.compiler.cli import main
from plait.compiler.commands.shared import EXIT_CODES, exit_code, options_of
from plait.errors import (
    AnotherFailure,
    BadOption,
    DamagedArtifact,
    DamagedBundle,
    KernelBuildFailed,
    NothingToFind,
    PassFailed,
    UnknownPass,
    WrongInputShape,
)


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, list(args), catch_exceptions=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "cache"))
    found = Cache()
    found.put(Key.of("kernel", source="a", isa="v3"), {"k.so": b"1234"})
    found.put(Key.of("kernel", source="a", isa="v4"), {"k.so": b"12345"})
    found.put(Key.of("graph", text="g"), {"plan.json": b"{}"})
    return found


def test_every_command_has_help_and_json() -> None:
    def walk(command, path):
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        else:
            yield path, command

    for path, command in walk(main, ()):
        assert command.help, path
        assert {"as_json"} <= {p.name for p in command.params}, path
        assert plait(*path, "--help").exit_code == 0


def test_env_reports_what_a_bug_report_needs() -> None:
    found = json.loads(plait("env", "--json").stdout)
    assert {"plait", "torch", "triton", "python", "processor", "cxx", "devices", "cache", "variables"} <= found.keys()
    assert f"torch            {found['torch']}" in plait("env").stdout


def test_passes_are_listed_with_their_options() -> None:
    found = {p["name"]: p for p in json.loads(plait("passes", "--json").stdout)}
    assert found["prune"]["summary"].startswith("Drop pure nodes")
    assert "prune  (any)" in plait("passes").stdout


def test_the_cache_can_be_listed_explained_and_pruned(cache: Cache) -> None:
    assert plait("cache", "path").stdout.strip() == str(cache.root)
    entries = json.loads(plait("cache", "ls", "--json").stdout)
    assert sorted(e["bytes"] for e in entries) == [2, 4, 5]
    assert "2 entries" in plait("cache", "ls", "--kind", "kernel").stdout
    v4 = Key.of("kernel", source="a", isa="v4")
    explained = json.loads(plait("cache", "explain", v4.digest[:12], "--json").stdout)
    assert explained["key"]["isa"] == "v4" and explained["differs"] == {"isa": "v3"}
    assert "removed 3 entries" in plait("cache", "prune").stdout
    assert plait("cache", "ls").stdout.strip() == "0 entries, 0 B"


def test_built_kernels_are_named_and_those_without_their_object_are_built_again(cache: Cache) -> None:
    sources = {name: f'extern "C" void {name}(void* const*, const long*, int) {{}}' for name in ("tanh_1a", "relu_2b")}
    load_kernels(sources, cache)
    listed = json.loads(plait("cache", "ls", "--json").stdout)
    kernel = next(e["digest"] for e in listed if e.get("functions") == ["tanh_1a"] and e["kind"] == "kernel")
    objects = cache.entries("objects")
    assert {n for e in listed if e["kind"] == "objects" for n in e["functions"]} == set(sources)
    assert "tanh_1a" in plait("cache", "ls").stdout
    explained = json.loads(plait("cache", "explain", kernel, "--json").stdout)
    assert explained["functions"] == "tanh_1a" and explained["objects"] in {e.key.digest for e in objects}
    for entry in objects:
        shutil.rmtree(entry.folder)
    assert "gone" in json.loads(plait("cache", "explain", kernel, "--json").stdout)["objects"]
    assert load_kernels(sources, cache).keys() == sources.keys()
    assert "gone" not in plait("cache", "explain", kernel).stdout
    assert plait("cache", "verify").exit_code == 0


def test_damage_in_the_cache_is_found_removed_and_an_exit_code(cache: Cache) -> None:
    assert plait("cache", "verify").exit_code == 0
    cache.entries("graph")[0].path("plan.json").write_bytes(b"[]")
    result = plait("cache", "verify")
    assert result.exit_code == 1 and "the checksum does not match" in result.stdout
    assert plait("cache", "verify").exit_code == 0


def test_an_unknown_cache_entry_is_an_error(cache: Cache) -> None:
    result = plait("cache", "explain", "zz")
    assert result.exit_code == 2 and "P0705" in result.stderr and result.stdout == ""


def test_texts_are_compared(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n")
    (tmp_path / "b.txt").write_text("x = 2\n")
    result = plait("diff", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    assert result.exit_code == 1 and "-x = 1" in result.stdout and "+x = 2" in result.stdout
    same = plait("diff", str(tmp_path / "a.txt"), str(tmp_path / "a.txt"))
    assert same.exit_code == 0 and same.stdout == "no differences\n"


def test_errors_have_an_exit_code_by_whose_turn_it_is() -> None:
    assert exit_code(UnknownPass(name="x", near="y")) == 2
    assert exit_code(BadOption(name="x", expected="y", value=1)) == 2
    assert exit_code(PassFailed(name="x", rule="", why="", context="")) == 3
    assert exit_code(KernelBuildFailed(compiler="", source="", output="", command="")) == 3
    assert exit_code(DamagedArtifact(part="x", why="y")) == 4
    assert exit_code(WrongInputShape(dim=0, name="x", expected=1, got=2, shape=(), spec="")) == 4
    assert exit_code(DamagedBundle(part="x", why="y")) == 4
    assert exit_code(NothingToFind(name="x")) == 1
    assert exit_code(AnotherFailure(name="x", found="", expected="")) == 6
    assert {0, 1, 2, 3, 4, 5, 6, 130} == set(EXIT_CODES)


def test_options_are_read_from_the_command_line() -> None:
    found = options_of(
        ("fold.max_elements=16", "quantize:bits=4,group=32"), ("share,prune",), ("freeze", "verify=each-pass")
    )
    assert found == {
        "fold.max_elements": "16",
        "passes": ["quantize:bits=4,group=32"],
        "disable_passes": ["share", "prune"],
        "freeze": True,
        "verify": "each-pass",
    }


def test_the_command_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from plait.compiler.cli import main; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert run.stdout.strip() == "False", run.stderr
