import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import plait
import pytest
import torch
from plait.errors import (
    DamagedArtifact,
    KernelBuildFailed,
    KernelMissing,
    NoBinaryFits,
    NoCompiler,
    StructureNotPortable,
    UnsafePlan,
    WrongInputShape,
    WrongInputStructure,
    WrongInputType,
)
from plait.runtime import archive, machine, native, weights
from plait.runtime.artifact import load, write
from plait.runtime.plan import Launch
from torch.utils import _pytree as pytree

from tests.runtime.kit import chain, edit, edit_manifest, make_plan, structure, tensor_input, value, weighted


def test_round_trip(path):
    model = plait.load(path)
    x = torch.randn(8)
    assert torch.equal(model(x), 2 * (x + torch.arange(8.0)))
    assert model.inputs == [{"name": "x", "kind": "tensor", "dtype": "float32", "device": "cpu", "shape": ["8"]}]
    assert model.outputs == [{"kind": "tensor", "dtype": "float32", "device": "cpu", "shape": ["8"]}]
    assert model.coverage == {"generated": 2}
    assert model.manifest["passes"] == ["fold"]
    assert model.graphs == {"tensor": "graph main()"}
    with pytest.raises(WrongInputShape, match="dimension 0 of input 'x' must be 8, got 9"):
        model(torch.zeros(9))


def test_any_zip_tool_and_any_safetensors_reader_can_read_it(path, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        read = safetensors.load(file.read("weights.safetensors"))
    assert torch.equal(read["w"], torch.arange(8.0))


def test_equal_parts_give_equal_bytes(parts, path, tmp_path):
    write(tmp_path / "again.plait", parts)
    assert (tmp_path / "again.plait").read_bytes() == path.read_bytes()


def test_members_are_aligned_and_weights_are_not_copied(path):
    opened = archive.Archive(path)
    assert all(opened.offset(name) % 64 == 0 for name in opened.names)
    model = load(path)
    (tensor,) = [t for _, _, t in model.executable._constants]
    assert tensor.data_ptr() % 64 == 0
    tensor.add_(1)  # a write stays in the process
    assert torch.equal(model(torch.zeros(8)), 2 * (torch.arange(8.0) + 1))
    assert torch.equal(load(path)(torch.zeros(8)), 2 * torch.arange(8.0))


def test_nested_arguments_and_results(parts, tmp_path, cache):
    inputs = [tensor_input(name, (8,)) for name in ("a", "b", "c")]
    values = [value(i, "input", (8,), i) for i in range(3)] + [value(3, "fresh", (8,)), value(4, "fresh", (8,))]
    plan = make_plan(inputs, values, [Launch("add", (0, 1, 3), (8,)), Launch("twice", (2, 4), (8,))], [3, 4, 0])
    tree = structure(0, [0], scale=0)
    out = pytree.tree_structure({"sum": 0, "rest": (0, 0)})
    write(tmp_path / "n.plait", replace(parts, plan=plan, in_tree=tree, out_tree=out, weights={}))
    model = load(tmp_path / "n.plait")
    a, b, c = torch.randn(3, 8)
    result = model(a, [b], scale=c)
    assert torch.equal(result["sum"], a + b)
    assert torch.equal(result["rest"][0], 2 * c)
    assert result["rest"][1] is a
    for args, kwargs in (((a, b), {"scale": c}), ((a, [b]), {}), ((a, [b, c]), {}), ((a, [b]), {"other": c})):
        with pytest.raises(WrongInputStructure, match=r"must have the structure \(\(\*, \[\*\]\), \{'scale': \*\}\), got"):
            model(*args, **kwargs)
    with pytest.raises(WrongInputType, match="input 'c' must be a tensor, got float"):
        model(a, [b], scale=1.0)


def test_keywords_come_in_any_order(parts, tmp_path, cache):
    inputs = [tensor_input(name, (8,)) for name in ("a", "b")]
    values = [value(0, "input", (8,), 0), value(1, "input", (8,), 1), value(2, "fresh", (8,))]
    plan = make_plan(inputs, values, [Launch("twice", (1, 2), (8,))], [2])
    write(tmp_path / "k.plait", replace(parts, plan=plan, in_tree=structure(a=0, b=0), weights={}))
    model = load(tmp_path / "k.plait")
    a, b = torch.randn(2, 8)
    assert torch.equal(model(b=b, a=a), 2 * b)
    assert torch.equal(model(a=a, b=b), 2 * b)


def test_dynamic_model_without_positional_overhead(parts, tmp_path, cache):
    write(tmp_path / "d.plait", replace(parts, plan=chain(), weights={}))
    model = load(tmp_path / "d.plait")
    for n in (3, 100):
        x = torch.randn(n)
        assert torch.equal(model(x), 4 * x)
    assert model.inputs[0]["shape"] == ["s0"]
    with pytest.raises(WrongInputType, match="must be a tensor, got list"):
        model([torch.zeros(3)])


def test_unknown_containers(parts, path, tmp_path):
    class Odd:
        pass

    pytree.register_pytree_node(Odd, lambda o: ([0], None), lambda children, context: Odd())
    with pytest.raises(StructureNotPortable, match="outputs cannot be stored"):
        write(tmp_path / "o.plait", replace(parts, out_tree=pytree.tree_structure(Odd())))
    edited = edit_manifest(
        path, lambda m: m["structure"].update(outputs=[1, {"type": "other.Odd", "context": "1", "children_spec": []}])
    )
    with pytest.raises(StructureNotPortable, match=r"outputs cannot be restored: .*other.Odd"):
        load(edited)


# Weights.

EVERY_DTYPE = {name: torch.ones(3, 5).to(dtype) for name, dtype in weights.DTYPES.items()}


def test_weights_of_every_dtype_and_shape(tmp_path):
    tensors = {
        **EVERY_DTYPE,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "slice": torch.arange(100)[10:20:3],
    }
    file = tmp_path / "w"
    file.write_bytes(b"".join(weights.serialise(tensors)))
    import mmap

    with file.open("rb") as f:
        buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    found = weights.read(buffer, 0, len(buffer), "w")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype
        assert torch.equal(found[name].to(torch.complex64), t.to(torch.complex64)), name
    with pytest.raises(ValueError, match=r"'q' has dtype torch.complex128"):
        weights.serialise({"q": torch.zeros(1, dtype=torch.complex128)})


def test_tied_and_strided_weights(parts, tmp_path, cache):
    w = torch.randn(8)
    m = torch.randn(4, 3).t()
    values = [
        value(0, "constant", (8,), "a"),
        value(1, "constant", (8,), "b"),
        value(2, "constant", (3, 4), "m", strides=(1, 3)),
    ]
    plan = make_plan([], values, [], [0, 1, 2])
    tree = pytree.tree_structure((0, 0, 0))
    weights_ = {"a": w, "b": w, "m": m}
    write(tmp_path / "t.plait", replace(parts, plan=plan, weights=weights_, in_tree=structure(), out_tree=tree))
    a, b, c = load(tmp_path / "t.plait")()
    assert a.data_ptr() == b.data_ptr()
    assert torch.equal(a, w)
    assert torch.equal(c, m)
    assert c.stride() == (1, 3)


def test_a_plan_whose_weights_are_missing(parts, tmp_path, cache):
    write(tmp_path / "m.plait", replace(parts, weights={}))
    with pytest.raises(DamagedArtifact, match="the weight 'w' is missing"):
        load(tmp_path / "m.plait")
    write(tmp_path / "m.plait", replace(parts, weights={"w": torch.zeros(9)}))
    with pytest.raises(DamagedArtifact, match="not what the plan expects"):
        load(tmp_path / "m.plait")


# Machines.


def test_targets_fit_by_flags(monkeypatch):
    v4 = frozenset(machine.TARGETS["x86-64-v4"].requires)
    listed = {n: {"machine": t.machine, "requires": t.requires} for n, t in machine.TARGETS.items()}
    for host, expected in (
        (("x86_64", v4 | {"other"}), ["x86-64-v4", "x86-64-v3"]),
        (("x86_64", v4 - {"avx512vl"}), ["x86-64-v3"]),
        (("x86_64", v4 - {"fma"}), []),
        (("aarch64", frozenset({"asimd"})), ["aarch64"]),
    ):
        monkeypatch.setattr(machine, "host", lambda host=host: host)
        assert machine.fitting(listed) == expected


def other_machine(monkeypatch):
    monkeypatch.setattr(machine, "host", lambda: ("riscv64", frozenset({"rv64gcv"})))


def test_rebuilds_from_source_where_no_binary_fits(path, cache, monkeypatch):
    other_machine(monkeypatch)
    x = torch.randn(8)
    assert torch.equal(load(path)(x), 2 * (x + torch.arange(8.0)))
    (built,) = cache.glob("rebuilt-*.so")
    before = built.stat().st_mtime_ns
    load(path)
    assert built.stat().st_mtime_ns == before


def test_refuses_where_nothing_can_be_built(path, cache, monkeypatch):
    other_machine(monkeypatch)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        NoBinaryFits, match=r"kernels for aarch64, x86-64-v3, x86-64-v4, this machine is riscv64.*no C\+\+ compiler"
    ):
        load(path)
    with pytest.raises(NoCompiler):
        native.build_shared(["int x;"], cache / "x.so")


def test_a_binary_that_does_not_load_is_replaced(parts, tmp_path, cache, caplog):
    broken = {"kernels.so": b"not a shared object", "runner.so": b"neither"}
    write(tmp_path / "b.plait", replace(parts, binaries=dict.fromkeys(parts.binaries, broken)))
    assert torch.equal(load(tmp_path / "b.plait")(torch.zeros(8)), 2 * torch.arange(8.0))
    assert "do not load" in caplog.text


def test_a_source_that_does_not_compile(parts, tmp_path, cache, monkeypatch):
    other_machine(monkeypatch)
    write(tmp_path / "s.plait", replace(parts, sources={"kernels.cpp": "this is not C++"}))
    with pytest.raises(KernelBuildFailed, match="error"):
        load(tmp_path / "s.plait")


def test_an_altered_cache_is_not_trusted(path, cache):
    load(path)
    assert (cache.stat().st_mode & 0o777) == 0o700
    for file in cache.glob("*.so"):
        # a new file, as loaded ones are mapped into this process
        file.unlink()
        file.write_bytes(b"evil")
    assert torch.equal(load(path)(torch.zeros(8)), 2 * torch.arange(8.0))


def test_works_without_a_writable_cache(path, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert torch.equal(load(path)(torch.zeros(8)), 2 * torch.arange(8.0))


def test_what_a_target_needs(parts, tmp_path, cache):
    bare = {"kernels.so": parts.binaries["aarch64"]["kernels.so"]}
    with pytest.raises(KernelMissing, match=r"x86-64-v3/runner.so"):
        write(tmp_path / "w.plait", replace(parts, binaries={"x86-64-v3": bare}))
    swapped = {"runner.so": parts.binaries["aarch64"]["runner.so"]}
    write(tmp_path / "w.plait", replace(parts, binaries=dict.fromkeys(parts.binaries, swapped)))
    with pytest.raises(KernelMissing, match="the kernel 'add'"):
        load(tmp_path / "w.plait")


def test_unsafe_plans_are_neither_written_nor_loaded(parts, path, tmp_path):
    unsafe = replace(weighted(), arena=8)
    with pytest.raises(UnsafePlan, match="not proven to lie inside the arena"):
        write(tmp_path / "u.plait", replace(parts, plan=unsafe))
    edited = edit(path, {"plan.json": lambda text: text.replace(b'"arena":32', b'"arena":16')})
    with pytest.raises(UnsafePlan, match="not proven to lie inside the arena"):
        load(edited)


# The process that loads.


def test_loading_needs_no_compiler_and_no_repository_state(path, tmp_path):
    code = (
        "import sys, torch, plait\n"
        f"m = plait.load({str(path)!r})\n"
        "print(m(torch.ones(8)).sum().item())\n"
        "light = 'errors', 'formats', 'runtime'\n"
        "bad = [n for n in sys.modules if n.startswith('plait.') and n.split('.')[1] not in light]\n"
        "bad += [n for n in ('sympy', 'torch._dynamo', 'torch._inductor', 'triton') if n in sys.modules]\n"
        "print(bad)"
    )
    environment = {**os.environ, "PLAIT_CACHE_DIR": str(tmp_path / "other"), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.splitlines() == ["72.0", "[]"], done.stderr


def test_relocatable(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(path, tmp_path / "elsewhere" / "renamed"))
    assert torch.equal(load(moved)(torch.zeros(8)), 2 * torch.arange(8.0))


def test_manifest_says_what_is_inside(path):
    opened = archive.Archive(path)
    assert set(opened.names) >= {
        "plan.json",
        "weights.safetensors",
        "graphs/tensor.txt",
        "kernels/src/kernels.cpp",
        "kernels/src/runner.cpp",
    }
    for name, entry in opened.manifest["members"].items():
        assert entry["sha256"] == hashlib.sha256(opened.view(name)).hexdigest()
        assert entry["bytes"] == len(opened.view(name))
    assert opened.manifest["targets"]["aarch64"] == {"machine": "aarch64", "requires": []}
