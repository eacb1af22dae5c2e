"""Graphs captured on the CPU, compiled for CUDA devices that this machine need not have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from plait.codegen.cache import Cache
from plait.codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from plait.codegen.target import CPU_ONLY, Target, retarget
from plait.codegen.triton.build import binaries
from plait.codegen.triton.interpret import Interpreter
from plait.codegen.triton.source import TritonSource
from plait.compiler.observe import observe
from plait.errors import CannotRetarget, NoCudaDriver, UnknownTarget
from plait.ir import TensorType, parse_graph, verify
from plait.runtime import cuda, devices, weights
from plait.runtime.check import check
from plait.runtime.plan import Call, KernelSpec, Launch, from_json, to_json

from tests import cuda_models, models
from tests.codegen.cuda_plan import run_interpreted
from tests.helpers import random_inputs, run


def compiled_for(text: str, target: str = "cuda:90", constants: dict[str, torch.Tensor] | None = None) -> CompiledGraph:
    return compile_graph(retarget(parse_graph(text, constants)), CodegenOptions(target=target))


def launches(compiled: CompiledGraph) -> list[Launch]:
    return [s for s in compiled.plan.steps if isinstance(s, Launch)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- moving graphs ------------------------------------------------------------------------------------------------------


def test_all_of_a_graph_moves_but_its_constants():
    graph = parse_graph(
        """def f(x: "f32[4,8]{1,4}"):
        w = plait.constant("w")
        zero = aten.full.default((8,), 0.0)
        ids = aten.arange.default(4, device=device("cpu"))
        product = aten.mul.Tensor(x, w)
        y = aten.add.Tensor(product, zero)
        return (y, ids)
    """,
        {"w": torch.ones(8)},
    )
    moved = retarget(graph)
    verify(moved)
    types = [v.type for v in (*moved.inputs, *(v for n in moved.nodes for v in n.results))]
    assert {t.device for t in types if isinstance(t, TensorType)} == {"cuda:0"}
    assert moved.inputs[0].tensor.strides == (1, 4)
    assert {str(n["device"]) for n in moved.nodes if "device" in n.op.index} == {"cuda:0"}
    assert moved.constants["w"].device.type == "cpu"
    assert graph.inputs[0].tensor.device == "cpu"


def test_regions_move_too():
    graph = parse_graph("""def f(x: "f32[4]", p: "b1[]"):
        def yes(x: "f32[4]"):
            a = aten.ones.default((4,), device=device("cpu"))
            y = aten.add.Tensor(x, a)
            return (y,)
        def no(x: "f32[4]"):
            y = aten.neg.default(x)
            return (y,)
        y = plait.cond(p, yes, no, (x,))
        return (y,)
    """)
    (node,) = (n for n in retarget(graph).nodes if n.op.name == "plait.cond")
    for region in node.regions:
        assert {v.tensor.device for v in (*region.inputs, *(n.out for n in region.nodes))} == {"cuda:0"}


ATTENTION = """def f(q: "f32[2,4,8,16]", k: "f32[2,4,8,16]", v: "f32[2,4,8,16]"):
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, {causal}, scale=0.5)
        return ({results},)
    """


def test_attention_of_cpus_becomes_that_of_any_device():
    moved = retarget(parse_graph(ATTENTION.format(causal=True, results="out")))
    verify(moved)
    (node,) = moved.nodes
    assert node.op.name == "aten.scaled_dot_product_attention.default"
    assert (node["is_causal"], node["scale"], node["attn_mask"], node["dropout_p"]) == (True, 0.5, None, 0.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ATTENTION.format(causal=False, results="out, sums"), "its second result is read"),
        (
            'def f(x: "f32[8]"):\n    a, b = aten.histogram.bin_ct(x, 4)\n    return (a,)',
            "aten.histogram.bin_ct cannot be compiled for CUDA devices: torch implements it for CPUs only",
        ),
        (
            'def f(x: "f32[4,8]", w: "f32[8,8]"):\n'
            '    y = mkldnn._linear_pointwise.default(x, w, None, "none", (), "")\n    return (y,)',
            "oneDNN's or MKL's",
        ),
    ],
)
def test_what_only_cpus_have_is_refused(text: str, why: str):
    with pytest.raises(CannotRetarget, match=why):
        retarget(parse_graph(text))


@pytest.mark.unchecked_graphs("its library is gone when the test is over")
def test_an_op_of_a_library_without_cuda_kernel_is_refused():
    library = torch.library.Library("plait_test_cpu", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    library.impl("twice", lambda x: torch.empty_like(x), "Meta")
    text = 'def f(x: "f32[8]"):\n    y = plait_test_cpu.twice.default(x)\n    return (y,)'
    with pytest.raises(CannotRetarget, match="the library plait_test_cpu has no CUDA kernel"):
        retarget(parse_graph(text))
    library.impl("twice", lambda x: 2 * x, "CUDA")
    assert retarget(parse_graph(text)).nodes[0].out.tensor.device == "cuda:0"


def test_the_list_of_ops_that_only_cpus_have_is_torchs():
    generator = pytest.importorskip("torchgen.gen")
    pytest.importorskip("yaml")
    from torchgen.model import DispatchKey

    folder = Path(generator.__file__).parent / "packaged" / "ATen" / "native"
    parsed = generator.parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    functions = {f.func.name: f for f in parsed.native_functions}

    def has(key: DispatchKey, f: object) -> bool:
        index = parsed.backend_indices[key]
        delegate = functions.get(f.structured_delegate)  # type: ignore[attr-defined]
        return index.has_kernel(f) or (delegate is not None and index.has_kernel(delegate))

    found = {
        f"aten.{name.name}.{name.overload_name or 'default'}"
        for name, f in functions.items()
        if has(DispatchKey.CPU, f) and not has(DispatchKey.CUDA, f) and not f.has_composite_kernel
        if not name.name.inplace and "out" not in name.overload_name
        if "test" not in str(name) and str(name) != "_foobar"
    }
    assert found == CPU_ONLY


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:9000", "hip:gfx942"])
def test_unknown_targets_are_refused(name: str):
    with pytest.raises(UnknownTarget, match=name):
        Target(name)


# -- whole models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cuda_models.block, cuda_models.mlp])
def test_a_model_compiles_for_devices_and_its_kernels_compute_what_torch_does(
    make, interpreter: Interpreter, triton_cache: Cache
):
    model, inputs = make()
    graph = retarget(cuda_models.captured(model, inputs))
    made = {sm: compile_graph(graph, CodegenOptions(target=f"cuda:{sm}")) for sm in (80, 90)}
    for sm, compiled in made.items():
        check(compiled.plan)
        assert from_json(json.loads(json.dumps(to_json(compiled.plan)))) == compiled.plan
        assert launches(compiled) and {k.language for k in compiled.plan.kernels} == {"triton"}
        assert {v.device for v in compiled.plan.values} == {"cuda:0"}
        found = binaries(compiled.plan, compiled.sources, f"cuda:{sm}", triton_cache)
        assert found.keys() == compiled.sources.keys() == {k.name for k in compiled.plan.kernels}
        assert {cuda_models.compute_capability(b.binary) for bs in found.values() for b in bs} == {sm}
    (result,) = run_interpreted(made[90], inputs, interpreter)
    torch.testing.assert_close(result, model(*inputs).detach(), rtol=1e-5, atol=1e-6)


def test_matmuls_and_attention_are_library_calls_and_nothing_falls_back():
    model, inputs = cuda_models.block()
    compiled = compile_graph(retarget(cuda_models.captured(model, inputs)), CodegenOptions(target="cuda:80"))
    assert compiled.coverage.fallback == 0
    assert set(compiled.coverage.reasons) == {
        ("aten.addmm.default", "cuBLAS's matmul"),
        ("aten.scaled_dot_product_attention.default", "torch's attention"),
    }


@pytest.mark.parametrize("rows", [2, 5, 33])
def test_dynamic_sizes(rows: int, interpreter: Interpreter):
    model, (tokens,) = cuda_models.mlp()
    shapes = ({0: torch.export.Dim("rows", min=1, max=64)},)
    compiled = compile_graph(retarget(cuda_models.captured(model, (tokens,), shapes)), CodegenOptions(target="cuda:90"))
    given = torch.randint(0, 50, (rows, 7), generator=torch.Generator().manual_seed(rows))
    (result,) = run_interpreted(compiled, [given], interpreter)
    torch.testing.assert_close(result, model(given).detach(), rtol=1e-5, atol=1e-6)


def test_row_ids_out_of_range_are_reported(interpreter: Interpreter):
    model, (tokens,) = cuda_models.mlp()
    compiled = compile_graph(retarget(cuda_models.captured(model, (tokens,))), CodegenOptions(target="cuda:90"))
    tokens[3, 2] = 50
    with pytest.raises(IndexError, match="row id outside its table"):
        run_interpreted(compiled, [tokens], interpreter)


SCALE = models.Scale(layers=1, width=16, image=16)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "unet" else n for n in models.MODELS])
def test_known_models(name: str, interpreter: Interpreter):
    graph = cuda_models.captured(models.build(name, SCALE), models.example(name, SCALE, 2, 8))
    inputs = random_inputs(graph)
    compiled = compile_graph(retarget(graph), CodegenOptions(target="cuda:90"))
    assert compiled.coverage.fallback == 0
    for got, want in zip(run_interpreted(compiled, inputs, interpreter), run(graph, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_graphs_of_training(interpreter: Interpreter):
    torch._dynamo.reset()
    with observe() as seen:
        model = torch.compile(models.build("resnet", SCALE).train(), backend="plait")
        model(**models.example("resnet", SCALE, 2)).square().mean().backward()
    assert [r.kind for r in seen.graphs] == ["forward", "backward"]
    for record in seen.graphs:
        assert record.graph is not None
        inputs = random_inputs(record.graph)
        compiled = compile_graph(retarget(record.graph), CodegenOptions(target="cuda:90"))
        got, want = run_interpreted(compiled, inputs, interpreter), run(record.graph, inputs)
        for a, b in zip(got, want, strict=False):  # what is written to inputs comes behind the results
            if isinstance(b, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


# -- kernels and launches -----------------------------------------------------------------------------------------------


def test_each_nest_of_a_kernel_is_a_launch_with_an_access_of_its_own(interpreter: Interpreter):
    compiled = compiled_for("""def f(x: "f32[3,40000]"):
        s = aten.sum.dim_IntList(x, (1,))
        return (s,)
    """)
    first, second = launches(compiled)
    specs = {k.name: k for k in compiled.plan.kernels}
    assert specs[first.kernel].access == ("read", "write") and specs[second.kernel].access == ("read", "write")
    assert first.buffers[1] == second.buffers[0]  # partial sums
    x = rand(3, 40000)
    torch.testing.assert_close(run_interpreted(compiled, [x], interpreter)[0], x.sum(1), rtol=1e-5, atol=1e-4)


def test_half_types_and_writes_to_inputs(interpreter: Interpreter):
    compiled = compiled_for("""def f(x: "bf16[7,16]", state: "f16[16]"):
        s = aten.sum.dim_IntList(x, (0,))
        y = aten._to_copy.default(s, dtype=torch.float16)
        new = aten.add.Tensor(state, y)
        state[...] = new
        return (new,)
    """)
    x, state = rand(7, 16).bfloat16(), rand(16, seed=1).half()
    expected = state + x.sum(0).half()
    (result,) = run_interpreted(compiled, [x, state], interpreter)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(state, expected)


def test_a_value_on_another_device_stays_with_torch():
    text = """def f(x: "f32[8]@cuda:1", y: "f32[8]@cuda:1", scale: "f32[]"):
        a = aten.mul.Tensor(x, scale)
        e = aten.exp.default(a)
        b = aten.add.Tensor(e, y)
        return (b,)
    """
    compiled = compile_graph(parse_graph(text), CodegenOptions(target="cuda:90"))
    check(compiled.plan)
    assert compiled.coverage.reasons == [("aten.mul.Tensor", "device cpu")]
    assert len(launches(compiled)) == 1


def test_a_source_is_read_back_from_the_plan():
    compiled = compiled_for("""
graph(level="tensor", symbols={"s0": (1, 64, 4)})
def f(x: "f32[s0,8]"):
    y = aten._softmax.default(x, 1, False)
    return (y,)
""")
    (spec,) = compiled.plan.kernels
    source = TritonSource.of(spec, compiled.sources[spec.name])
    assert source.spec(spec.access) == spec and source.hash == spec.source
    assert source.sizes == ("s0",) and source.programs({"s0": 5}) >= 1


def test_binaries_assume_of_alignment_what_the_plan_proves(triton_cache: Cache):
    compiled = compiled_for(
        """def f(x: "f32[64]"):
        w = plait.constant("w")
        product = aten.mul.Tensor(x, w)
        ordered, order = aten.sort.default(product)
        y = aten.neg.default(ordered)
        return (y,)
    """,
        constants={"w": torch.ones(64)},
    )
    found = binaries(compiled.plan, compiled.sources, "cuda:80", triton_cache)
    first, second = (found[s.kernel] for s in launches(compiled))
    every = tuple(name for name, kind in first[0].parameters if kind.startswith("*"))
    assert [b.aligned for b in first] == [every, every[1:]]  # the input may be any view
    assert len(second) == 1 and len(second[0].aligned) == 2  # sort allocates its results


def test_constants_move_with_their_strides_and_ties():
    plan = compiled_for(
        """def f(x: "f32[8,4]"):
        a = plait.constant("a")
        b = plait.constant("b")
        y = aten.add.Tensor(x, a)
        z = aten.add.Tensor(y, b)
        return (z,)
    """,
        constants={"a": rand(4, 8).t(), "b": rand(4, 8).t()},
    ).plan
    there = dataclasses.replace(plan, values=tuple(dataclasses.replace(v, device="meta") for v in plan.values))
    t = rand(4, 8).t()
    moved = weights.placed(there, {"a": t, "b": t})
    assert moved["a"] is moved["b"] and moved["a"].device.type == "meta" and moved["a"].stride() == (1, 8)


def test_a_plan_is_placed_on_another_device():
    plan = compiled_for("""def f(x: "f32[8]"):
        r, t = aten.randn.default((8,), device=device("cpu"))
        y = aten.add.Tensor(x, r)
        return (y,)
    """).plan
    placed = devices.place(plan, torch.device("cuda:3"))
    (call,) = (s for s in placed.steps if isinstance(s, Call))
    assert dict(call.kwargs)["device"] == {"dev": "cuda:3"}
    assert {v.device for v in placed.values} == {i.device for i in placed.inputs} == {"cuda:3"}
    assert devices.place(plan, torch.device("cpu")) is plan


def test_without_a_driver_a_compiled_graph_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-absent.so")
    cuda.default_driver.cache_clear()
    compiled = compiled_for('def f(x: "f32[8]"):\n    y = aten.exp.default(x)\n    return (y,)')
    with pytest.raises(NoCudaDriver):
        _ = compiled.executable
    assert isinstance(compiled.plan.kernels[0], KernelSpec)
