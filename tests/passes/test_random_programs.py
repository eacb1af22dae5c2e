"""The ground passes on random programs: every graph stays well-formed and gives the same bits."""

import time
from typing import Any

import pytest
import torch
from plait.ir import Graph, from_fx, parse_graph
from plait.passes import Context, make, run_pipeline
from plait.passes.decompositions import table
from torch._dynamo.backends.common import aot_autograd

from tests.generate import program
from tests.helpers import assert_bit_equal, check_graph, copies, run

GROUND = ("normalise", "fold", "simplify", "share", "layout", "prune")


@pytest.mark.parametrize("decomposed", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_ground_passes_keep_every_bit(seed: int, decomposed: bool):
    checked: list[Graph] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        graph = from_fx(gm)

        def call(inputs: Any) -> Any:
            args = list(inputs)
            after, steps = run_pipeline(graph, [make(n) for n in GROUND], Context(at="split"), verify="each-pass")
            check_graph(after, runs=False)
            for step in steps:
                assert_bit_equal(run(step.after, copies(args)), run(step.before, copies(args)))
            checked.append(after)
            return gm.forward(*inputs)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    made = program(seed * 7 + decomposed)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, decompositions=table() if decomposed else {})
    compiled = torch.compile(made.fn, backend=backend, fullgraph=True, dynamic=made.dynamic)
    for sizes in range(len(made.sizes)):
        compiled(*made.make_inputs(sizes))
    assert checked


LAYER = """
    l{i}, m{i}, r{i} = aten.native_layer_norm.default(x{i}, (64,), None, None, 1e-05)
    v{i} = aten.view.default(l{i}, (9*{b}, 64))
    t{i} = aten.t.default(w)
    q{i} = aten.addmm.default(b, v{i}, t{i})
    qv{i} = aten.view.default(q{i}, ({b}, 9, 192))
    qa{i}, qb{i}, qc{i} = aten.split.Tensor(qv{i}, 64, -1)
    pa{i} = aten.permute.default(qa{i}, (0, 2, 1))
    pb{i} = aten.permute.default(pa{i}, (0, 2, 1))
    sc{i} = aten.mul.Scalar(pb{i}, 0.125)
    sg{i} = aten.sigmoid.default(sc{i})
    y{i} = aten.mul.Tensor(sg{i}, qb{i})
    z{i} = aten.add.Tensor(y{i}, qc{i})
    al{i} = aten.alias.default(z{i})
    p{i} = aten.pow.Tensor_Scalar(al{i}, 2)
    mean{i} = aten.mean.dim(p{i}, (-1,), True)
    e{i} = aten.add.Scalar(mean{i}, 1e-05)
    rs{i} = aten.rsqrt.default(e{i})
    n{i} = aten.mul.Tensor(z{i}, rs{i})
    o{i} = aten.mul.Tensor(n{i}, 1.0)
    x{j} = aten.add.Tensor(o{i}, x{i})"""


def _layers(count: int, batch: str) -> Graph:
    symbols = '"s0": (2, None, 8)' if batch == "s0" else ""
    body = "".join(LAYER.format(i=i, j=i + 1, b=batch) for i in range(count))
    return parse_graph(
        f'graph(level="tensor", symbols={{{symbols}}})\n'
        f'def f(x0: "f32[{batch},9,64]", w: "f32[192,64]", b: "f32[192]"):{body}\n    return (x{count},)\n'
    )


@pytest.mark.parametrize("batch", ["8", "s0"])
def test_time_of_the_standard_pipeline_does_not_grow_with_the_square_of_the_graph(batch: str):
    """Eight times the nodes in less than twenty times the processor time: the square would be 64. The seconds themselves
    are letter g of `python -m benchmarks spine`."""
    taken: dict[int, float] = {}
    for layers in (30, 240):
        graph, times = _layers(layers, batch), list[float]()
        for _ in range(3):
            start = time.process_time()
            after, _ = run_pipeline(graph.replace(), [make(n) for n in GROUND], Context(at="split"), verify="each-pass")
            times.append(time.process_time() - start)
        assert len(after.nodes) < 0.86 * len(graph.nodes)
        taken[layers] = min(times)
    assert taken[240] < 20 * taken[30], f"30 layers take {taken[30]:.3f} s, 240 take {taken[240]:.3f} s"
