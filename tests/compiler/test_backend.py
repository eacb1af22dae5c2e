"""torch.compile(backend="plait") as users meet it: modes, options, dynamic sizes, mutation, control flow, stances."""

from __future__ import annotations

import copy
import gc
import logging
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plait.compiler.observe import Observation, observe
from plait.ir import Builder, Graph, Rule, Var, pattern, rewrite
from plait.passes.base import Context, Numerics, Pass
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops import scan, while_loop

from tests.compiler.programs import PASSES, PROGRAMS


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def check(fn: Any, *args: Any, grad: bool = False, **how: Any) -> Observation:
    """Compile and compare with eager: results, mutated arguments, strides, and gradients where asked."""
    twins = copy.deepcopy(args)
    compiled = torch.compile(fn, backend="plait", **how)
    with observe() as seen:
        got = compiled(*args)
        want = fn(*twins)
        torch.testing.assert_close(got, want)
        if grad:
            leaves = torch.utils._pytree.tree_leaves
            for result in (got, want):
                total = sum(t.sum() for t in leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad)
                total.backward()
            for a, b in zip(leaves(args), leaves(twins), strict=True):
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(args, twins)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.stride() == b.stride()
    return seen


# -- modes and options ------------------------------------------------------------------------------------------------


def scaled(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * 2 + 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    check(scaled, torch.randn(4, 5), mode=mode)
    torch._dynamo.reset()
    check(scaled, torch.randn(4, 5), options={"mode": mode})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "P0401.*'fast'.*max-autotune"),
        ({"verfy": "off"}, "P0402.*'verfy', did you mean 'verify'"),
        ({"prune.deep": 1}, "P0202.*prune has no option 'deep'"),
        ({"verify": "always"}, "P0403.*off or structure or each-pass.*'always'"),
        ({"freeze": 3}, "P0403.*freeze.*bool.*3"),
        ({"passes": [3]}, "P0403.*passes.*3"),
        ({"disable_passes": ["prun"]}, "P0201.*prun.*prune"),
        ({"disable_passes": ["all"]}, "P0201.*all"),  # a word of `print_after` alone
        ({"fold.max_elements": "many"}, "P0203.*max_elements.*int"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"(?s){message}"):
        torch.compile(scaled, backend="plait", options=options)(torch.randn(3))


def test_unknown_mode_by_keyword() -> None:
    with pytest.raises(BackendCompilerFailed, match="P0401"):
        torch.compile(scaled, backend="plait", mode="fastest")(torch.randn(3))


def test_passes_can_be_chosen_tuned_and_left_out() -> None:
    options = {"passes": [PASSES["split-rebuild"]], "disable_passes": ["share"], "fold.max_elements": 3}
    (record,) = check(scaled, torch.randn(4), options=options).graphs
    names = [s.pass_name for s in record.history]
    assert names[0] == "split-rebuild" and "share" not in names and "prune" in names
    assert next(s for s in record.history if s.pass_name == "fold").options["max_elements"] == 3


def test_bisect_limit_stops_rules() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        return (x * 1 + 0).neg().neg()

    (full,) = check(noisy, torch.randn(4)).graphs
    torch._dynamo.reset()
    (none,) = check(noisy, torch.randn(4), options={"bisect_limit": 0}).graphs
    assert sum(sum(s.fired.values()) for s in full.history) > 0
    assert sum(sum(s.fired.values()) for s in none.history) == 0


def test_dump_print_and_log(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    options = {"dump_dir": str(tmp_path), "print_after": ["prune"]}
    with caplog.at_level(logging.INFO, "plait"):
        check(scaled, torch.randn(4), options=options)
    (folder,) = tmp_path.iterdir()
    written = sorted(p.name for p in folder.iterdir())
    assert written[0] == "000_captured.txt" and "coverage.json" in written
    assert any(p.endswith("_prune.txt") for p in written) and any(p.endswith(".cpp") for p in written)
    assert "after prune\ngraph(" in capsys.readouterr().err
    assert any("prune" in r.message and "nodes" in r.message for r in caplog.records)


def test_fallbacks_can_be_refused() -> None:
    def roots(x: torch.Tensor) -> torch.Tensor:
        return torch.logcumsumexp(x @ x.T, 0)

    seen = check(roots, torch.randn(4, 4))
    assert seen.coverage.fallback and any("logcumsumexp" in op for op, _ in seen.coverage.reasons)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"(?s)P0404.*logcumsumexp"):
        torch.compile(roots, backend="plait", options={"fallback": "error"})(torch.randn(4, 4))


def test_a_graph_that_cannot_be_imported_runs_in_torch_and_says_so(caplog: Any) -> None:
    from torch._higher_order_ops.associative_scan import associative_scan

    def sums(x: torch.Tensor) -> torch.Tensor:
        return associative_scan(lambda a, b: a + b, x, 0, combine_mode="generic") * 2

    def mapped(x: torch.Tensor) -> torch.Tensor:
        return torch._higher_order_ops.map(lambda r: r.sin(), x) + 1

    check(sums, torch.randn(4, 3))
    with caplog.at_level(logging.WARNING, "plait"):
        seen = check(mapped, torch.randn(4, 3))
    (record,) = seen.graphs
    assert "map" in record.torch_reason and record.runs == 1 and record.coverage.fallback > 0
    assert "runs in torch" in caplog.text


# -- capture by Dynamo ------------------------------------------------------------------------------------------------


def test_graph_breaks_keep_the_rest() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x) + 1
        torch._dynamo.graph_break()
        return torch.cos(y) * 2

    seen = check(broken, torch.randn(4, requires_grad=True), grad=True)
    assert [r.kind for r in seen.graphs].count("forward") == 2
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend="plait", fullgraph=True)(torch.randn(4))


def test_dynamic_sizes_compile_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 6))
    compiled = torch.compile(model, backend="plait", dynamic=True)
    with observe() as seen:
        for n in (5, 9, 2, 33):
            x = torch.randn(n, 6)
            torch.testing.assert_close(compiled(x), model(x))
            loss = compiled(x).square().sum()
            got = torch.autograd.grad(loss, list(model.parameters()))
            want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert [r.kind for r in seen.graphs] == ["forward", "backward"]
    assert [r.runs for r in seen.graphs] == [8, 4]


def test_a_new_size_recompiles_once() -> None:
    compiled = torch.compile(scaled, backend="plait")
    with observe() as seen:
        for n in (4, 5, 6, 7):
            x = torch.randn(n, 3)
            torch.testing.assert_close(compiled(x), scaled(x))
    assert len(seen.graphs) == 2 and [r.runs for r in seen.graphs] == [1, 3]
    assert seen.graphs[1].graph is not None and seen.graphs[1].graph.symbols


def test_sizes_as_results_and_arguments() -> None:
    def shaped(x: torch.Tensor, n: int) -> tuple[Any, ...]:
        return x.reshape(x.shape[0] // 2, -1).sum(1) * n, x.shape[0] * 2 + 1, torch.arange(n) + x.shape[1]

    check(shaped, torch.randn(6, 4), 3, dynamic=True)
    check(shaped, torch.randn(8, 2), 5, dynamic=True)


def test_stances() -> None:
    compiled = torch.compile(scaled, backend="plait", dynamic=False)
    with observe() as seen:
        compiled(torch.randn(4))
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(torch.randn(4))
            with pytest.raises(RuntimeError, match="recompile"):
                compiled(torch.randn(5))
        with torch.compiler.set_stance("eager_on_recompile"):
            compiled(torch.randn(6))
        with torch.compiler.set_stance("force_eager"):
            compiled(torch.randn(4))
    assert [r.runs for r in seen.graphs] == [2]


def test_forced_backend() -> None:
    compiled = torch.compile(scaled, backend="eager")
    with observe() as seen, torch.compiler.set_stance("default", force_backend="plait"):
        compiled(torch.randn(4))
    assert len(seen.graphs) == 1


# -- modes of torch ---------------------------------------------------------------------------------------------------


def test_autocast_inside_and_around() -> None:
    layer = nn.Linear(8, 8)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y.float() + 1

    check(inside, torch.randn(4, 8, requires_grad=True), grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        check(layer.forward, torch.randn(4, 8, requires_grad=True), grad=True)


def test_forward_passes_are_refused_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        seen = check(nn.Linear(8, 8).forward, torch.randn(4, 8), options={"passes": [PASSES["forward-identity"]]})
    assert all("autocast" in r.not_applied[0] for r in seen.graphs)


def test_no_grad_and_inference_mode() -> None:
    model = PROGRAMS["Attention"]()
    compiled = torch.compile(model, backend="plait")
    x = torch.randn(5, 6)
    want = model(x).detach()
    with observe() as seen:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), want)
        with torch.inference_mode():
            out = compiled(x)
            assert out.is_inference()
            torch.testing.assert_close(out, want)
        torch.testing.assert_close(compiled(x).detach(), want)  # memory made in inference_mode is usable outside
    assert {r.kind for r in seen.graphs} == {"inference", "forward", "backward"} or len(seen.graphs) >= 2


# -- arguments, mutation, aliases -------------------------------------------------------------------------------------


def test_lists_dicts_none_and_numbers() -> None:
    def mixed(xs: list[torch.Tensor], d: dict[str, Any], n: int, s: float, flag: bool, nothing: None) -> dict[str, Any]:
        total = xs[0] * n + xs[1] * s
        return {"sum": total if flag else -total, "nothing": nothing, "n": n, "d": [d["a"] + 1, d["b"] * 2]}

    check(mixed, [torch.randn(3), torch.randn(3)], {"a": torch.randn(2), "b": 4}, 3, 0.5, True, None)


def test_inputs_are_mutated() -> None:
    def write(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2).add_(y)
        y[0] = 7
        return x + y

    check(write, torch.randn(4, 3), torch.randn(4, 3))
    torch._dynamo.reset()
    check(write, torch.randn(4, 3), torch.randn(4, 3), options={"passes": [PASSES["forward-rebuild"]]})


def test_views_of_inputs_are_mutated() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[2:5].zero_()
        x.t()[1] += 1
        return x.sum()

    check(write, torch.randn(4, 3))


def test_a_mutated_input_that_carries_gradients() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        y.mul_(3)
        return y * x

    check(write, torch.randn(4, requires_grad=True), grad=True)

    def outer(leaf: torch.Tensor, fn: Any) -> torch.Tensor:
        x = leaf * 1
        out = fn(x)
        return (out + x).sum()

    def change(x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x.cos()

    for options in ({}, {"passes": [PASSES["forward-rebuild"]]}):
        torch._dynamo.reset()
        a, b = (torch.linspace(0, 1, 5).requires_grad_() for _ in range(2))
        outer(a, torch.compile(change, backend="plait", options=options)).backward()
        outer(b, change).backward()
        torch.testing.assert_close(a.grad, b.grad)


def test_outputs_alias_inputs_and_each_other() -> None:
    def views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        return x, x.t(), x[0], y, y.view(-1), y.t()

    seen = check(views, torch.randn(4, 3), fullgraph=True)
    assert len(seen.graphs) == 1
    x = torch.randn(4, 3)
    same, turned, row, y, flat, _ = torch.compile(views, backend="plait")(x)
    assert same is x and turned.data_ptr() == x.data_ptr() and row.data_ptr() == x.data_ptr()
    flat[0] = 9
    assert y[0, 0] == 9, "results that alias each other in eager do so here"


def test_a_view_of_a_written_input_stays_a_view() -> None:
    def write(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x.view(-1)

    for options in ({}, {"passes": [PASSES["forward-identity"]]}):
        torch._dynamo.reset()
        x = torch.randn(2, 3)
        with observe() as seen:
            out = torch.compile(write, backend="plait", options=options)(x)
        assert out.data_ptr() == x.data_ptr()
        assert bool(seen.graphs[0].not_applied) == bool(options)


def test_buffers_count() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x * self.count

    model = Counter()
    compiled = torch.compile(model, backend="plait")
    x = torch.randn(3)
    with observe() as seen:
        for i in (1, 2, 3):
            torch.testing.assert_close(compiled(x), x * i)
    assert model.count == 3 and [r.runs for r in seen.graphs] == [3]


def test_arguments_that_share_memory() -> None:
    def write(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    base = torch.randn(6)
    twin = base.clone()
    got = torch.compile(write, backend="plait")(base[:4], base[2:])
    torch.testing.assert_close(got, write(twin[:4], twin[2:]))
    torch.testing.assert_close(base, twin)


def test_strides_of_results() -> None:
    def laid(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.t() + 1, (x.t() * 2).contiguous(), torch.relu(x.unsqueeze(0).expand(3, 4, 5)), x[:, ::2] * 1

    check(laid, torch.randn(4, 5))
    check(lambda x: x * 2 + 1, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))


# -- control flow -----------------------------------------------------------------------------------------------------


def test_cond() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos(), (x,)) + 1

    for sign in (1, -1):
        check(branch, sign * torch.rand(4), fullgraph=True)
        check(branch, (sign * torch.rand(4)).requires_grad_(), grad=True, fullgraph=True)


def test_while_loop() -> None:
    def loop(x: torch.Tensor) -> torch.Tensor:
        _, y = while_loop(lambda i, y: i < 4, lambda i, y: (i + 1, torch.tanh(y) * 1.5), (torch.tensor(0), x))
        return y + 1

    check(loop, torch.randn(3), fullgraph=True)
    seen = check(loop, torch.randn(3, requires_grad=True), grad=True, fullgraph=True)
    ops = {n.op.name for r in seen.graphs if r.graph for n in r.graph.nodes}
    assert "plait.while_loop_stack_output" in ops, ops


def test_scan() -> None:
    def running(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scan(lambda c, y: (c * 0.5 + y, torch.sin(c + y)), torch.zeros(3), x)

    check(running, torch.randn(5, 3), fullgraph=True)
    check(running, torch.randn(5, 3, requires_grad=True), grad=True, fullgraph=True)


@pytest.mark.parametrize("which", ["forward-rebuild", "joint-rebuild", "split-rebuild"])
def test_passes_around_control_flow(which: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return h * 2 + x

    options = {"passes": [PASSES[which]]}
    seen = check(program, torch.randn(4, requires_grad=True), grad=True, options=options, fullgraph=True)
    assert not any(r.not_applied or r.torch_reason for r in seen.graphs)


def test_assertions_stay() -> None:
    def checked(x: torch.Tensor) -> torch.Tensor:
        torch._assert_async((x > 0).all(), "some x is not positive")
        return x + 1

    seen = check(checked, torch.rand(3) + 1)
    with pytest.raises(RuntimeError, match="some x is not positive"):
        torch.compile(checked, backend="plait")(-torch.ones(3))
    assert "aten._assert_async.msg" in {n.op.name for r in seen.graphs if r.graph for n in r.graph.nodes}


def test_pieces_whose_bounds_are_read_from_a_tensor() -> None:
    check(lambda x, at: torch.tensor_split(x, at, 1), torch.randn(3, 7), torch.tensor([1, 3, 3]))
    check(lambda x, at: x[at.item() :] * 2, torch.randn(7, 3), torch.tensor(2))


def test_sizes_read_from_tensors() -> None:
    def picked(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        rows = x.nonzero()
        return x[rows[:, 0]] * 2, rows.shape[0] + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(picked, torch.tensor([0.0, 3.0, 0.0, 5.0]), fullgraph=True)


def test_the_first_batch_is_not_kept() -> None:
    layer = nn.Linear(4, 4)
    compiled = torch.compile(layer, backend="plait")
    x = torch.randn(3, 4)
    batch = weakref.ref(x)
    out = compiled(x)
    del x, out
    gc.collect()
    assert batch() is None


# -- freezing ---------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_constants_until_they_change() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).eval()
    compiled = torch.compile(model, backend="plait", options={"freeze": True})
    x = torch.randn(3, 6)
    with observe() as seen, torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        (frozen,) = seen.graphs
        assert frozen.graph is not None and len(frozen.graph.inputs) == 1 and len(frozen.graph.constants) == 4
        model[0].weight.mul_(3)
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    assert [(r.kind, r.runs) for r in seen.graphs] == [("inference", 1), ("inference_unfrozen", 2)]


# -- checks that can fail ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nudge(Pass):
    """Changes results by a thousandth, whatever it promises."""

    name: ClassVar[str] = "nudge"
    at: ClassVar[Any] = "split"
    promise: Numerics

    def numerics(self) -> Numerics:
        return self.promise

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def build(m: Any, b: Builder) -> Any:
            return b.call("aten.mul.Tensor", b.call("aten.sin.default", m["x"]), 1.001)

        return rewrite(graph, [Rule("nudge", pattern("aten.tanh.default", Var("x")), build)], ctx.log)


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        (Numerics("exact"), False),
        (Numerics("approximate", 1e-5), False),
        (Numerics("approximate", 0.01), True),
        (Numerics("reassociates"), False),
    ],
)
def test_each_pass_is_judged(promise: Numerics, kept: bool) -> None:
    options = {"passes": [Nudge(promise)], "verify": "each-pass"}
    compiled = torch.compile(lambda x: torch.tanh(x * 1e-3), backend="plait", options=options)
    if kept:
        compiled(torch.randn(4))
    else:
        with pytest.raises(BackendCompilerFailed, match=r"(?s)P0413.*nudge.*output 0"):
            compiled(torch.randn(4))


@dataclass(frozen=True)
class Widen(Pass):
    """Returns another dtype than was promised."""

    name: ClassVar[str] = "widen"
    at: ClassVar[Any] = "split"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        builder = Builder(graph)
        for node in graph.nodes:
            builder.append(node)
        wide = builder.call("aten._to_copy.default", graph.outputs[0], dtype=torch.float64)
        return builder.finish(outputs=(wide,))


def test_a_pass_must_keep_the_interface() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"(?s)P0407.*outputs.*f32.*f64.*widen"):
        torch.compile(lambda x: x.tanh(), backend="plait", options={"passes": [Widen()]})(torch.randn(4))


# -- a fresh process --------------------------------------------------------------------------------------------------

FRESH = """
import torch
assert "plait" in torch.compiler.list_backends(), torch.compiler.list_backends()
f = torch.compile(lambda x: torch.tanh(x) * 2, backend="plait")
x = torch.randn(5)
torch.testing.assert_close(f(x), torch.tanh(x) * 2)
"""


def test_found_by_name_in_a_fresh_process_with_logs_and_traces(tmp_path: Path) -> None:
    env = {**os.environ, "TORCH_LOGS": "+plait", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FRESH], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "after prune" in done.stderr, "TORCH_LOGS=+plait shows graphs"
    traces = "".join(p.read_text() for p in tmp_path.glob("*.log"))
    assert "plait_0_0_inference_000_captured" in traces and "plait_0_0_inference_coverage" in traces
