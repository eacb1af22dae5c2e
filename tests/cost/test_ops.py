"""Counts of work against torch's own flop counter, and the bytes that ops move."""

from typing import Any

import pytest
import torch
from plait.codegen.convolution import reordered_call
from plait.cost.ops import SPECIAL, Work, graph_work, size_bytes, work
from plait.ir import TensorType, parse_graph, size_symbol
from plait.runtime import moe
from torch.utils.flop_counter import FlopCounterMode

assert moe is not None  # importing registers the ops

COUNTED = [
    ('x: "f32[4,6]", y: "f32[6,8]"', "aten.mm.default(x, y)"),
    ('x: "f32[8]", y: "f32[4,6]", z: "f32[6,8]"', "aten.addmm.default(x, y, z)"),
    ('x: "f32[3,4,6]", y: "f32[3,6,8]"', "aten.bmm.default(x, y)"),
    ('x: "f32[3,4,8]", y: "f32[3,4,6]", z: "f32[3,6,8]"', "aten.baddbmm.default(x, y, z)"),
    ('x: "f32[2,6,9,9]", y: "f32[8,6,3,3]"',
     "aten.convolution.default(x, y, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1)"),
    ('x: "f32[2,6,9,9]", y: "f32[8,3,3,3]"',
     "aten.convolution.default(x, y, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 2)"),
    ('x: "f32[2,6,9,9]", y: "f32[6,4,3,3]"',
     "aten.convolution.default(x, y, None, (2, 2), (0, 0), (1, 1), True, (0, 0), 1)"),
]  # fmt: skip


def node(inputs: str, call: str) -> Any:
    names = {"native_layer_norm": "r, m, v", "inv_ex": "r, i2", "flash": "r, s", "act_backward": "r, o2"}
    outs = next((v for k, v in names.items() if k in call), "r")
    return parse_graph(f"def f({inputs}):\n    {outs} = {call}\n    return (r,)\n")


@pytest.mark.parametrize(("inputs", "call"), COUNTED)
def test_products_count_as_torch_counts_them(inputs: str, call: str):
    graph = node(inputs, call)
    with FlopCounterMode(display=False) as counter:
        graph.run(*[torch.randn([int(s) for s in v.tensor.shape]) for v in graph.inputs])
    assert work(graph.nodes[0]).flops == counter.get_total_flops()


def test_a_convolution_asks_the_same_with_its_weight_laid_out_for_onednn():
    (convolution,) = node(*COUNTED[4]).nodes
    assert work(reordered_call(convolution, convolution["weight"])) == work(convolution) != Work()


@pytest.mark.parametrize(
    ("inputs", "call", "want"),
    [
        ('x: "f32[4,6]", y: "f32[6]"', "aten.add.Tensor(x, y)", Work(24, 96 + 24, 96)),
        ('x: "f32[4,6]"', "aten.mul.Tensor(x, x)", Work(24, 96, 96)),
        ('x: "bf16[4,6]"', "aten.exp.default(x)", Work(24 * SPECIAL, 48, 48)),
        ('x: "f32[4,6]{0,1}"', "aten.relu.default(x)", Work(24, 24, 96)),
        ('x: "f32[4,6]"', "aten.view.default(x, (24,))", Work()),
        ('x: "f32[4,6]"', "aten.sum.dim_IntList(x, (1,))", Work(24, 96, 16)),
        ('x: "f32[4,6]"', "aten.native_layer_norm.default(x, (6,), None, None, 1e-5)", Work(168, 96, 96 + 32)),
        ('x: "f32[1000,6]", i: "i64[3]"', "aten.embedding.default(x, i)", Work(0, 24 + 72, 72)),
        ('x: "f32[4,6]"', "aten.zeros_like.default(x)", Work(0, 0, 96)),
        ('x: "f32[4,6]"', "aten.clone.default(x)", Work(0, 96, 96)),
        (
            'x: "f32[4,5,6]", w: "f32[2,6,8]", r: "i64[4,2]"',
            "plait.expert_mm.default(x, w, r)",
            Work(2 * 20 * 6 * 8, 480 + 384 + 64, 640, fma=2 * 20 * 6 * 8),
        ),
        (
            'x: "f32[4,5,6]", g: "f32[4,5,8]", r: "i64[4,2]"',
            "plait.expert_mm_weight.default(x, g, r, 2)",
            Work(2 * 20 * 6 * 8, 480 + 640 + 64, 384, fma=2 * 20 * 6 * 8),
        ),
        (
            'x: "f32[4,5,6]", b: "f32[2,6]", r: "i64[4,2]"',
            "plait.expert_act.default(x, b, None, r, 'silu')",
            Work(120 * (SPECIAL + 1), 480 + 48 + 64, 480),
        ),
        (
            'g: "f32[4,5,6]", x: "f32[4,5,6]", b: "f32[2,6]", r: "i64[4,2]"',
            "plait.expert_act_backward.default(g, x, b, None, r, 'silu')",
            Work(120 * (SPECIAL + 2), 2 * 480 + 48 + 64, 480),
        ),
        (
            'g: "f32[4,5,6]", x: "f32[4,5,6]", o: "f32[4,5,6]", r: "i64[4,2]"',
            "plait.expert_act_backward.default(g, x, None, o, r, 'relu')",
            Work(120 * 5, 3 * 480 + 64, 2 * 480),
        ),
        (
            'x: "f32[7,6]", c: "i64[7,2]", s: "i64[7,2]"',
            "plait.moe_encode.default(x, c, s, None, 4, 9)",
            Work(0, 168 + 224, 4 * 9 * 6 * 4),
        ),
        (
            'b: "f32[4,9,6]", c: "i64[7,2]", s: "i64[7,2]"',
            "plait.moe_decode.default(b, c, s, None)",
            Work(2 * 14 * 6, 14 * 6 * 4 + 224, 168),
        ),
        (
            'b: "f32[4,9,6]", c: "i64[7,2]", s: "i64[7,2]", g: "f32[7,6]"',
            "plait.moe_decode_weight.default(b, c, s, g)",
            Work(2 * 14 * 6, 14 * 6 * 4 + 224 + 168, 56),
        ),
        ('c: "i64[7,2]"', "plait.moe_keep.default(c, None, 4, 3, True)", Work(14 * SPECIAL, 112, 112)),
        ('x: "f32[2,3,8,8]"', "aten.avg_pool2d.default(x, (2, 2))", Work(96 * 4, 1536, 384)),
        (
            'x: "f32[2,4,6,8]", y: "f32[2,4,5,8]", z: "f32[2,4,5,8]"',
            "aten._scaled_dot_product_flash_attention_for_cpu.default(x, y, z)",
            Work(7680, 4 * (384 + 320 + 320), 4 * (384 + 48), fma=2 * (2 * 4 * 6 * 5) * 16),
        ),
        ('x: "f32[4,4]"', "aten.linalg_inv_ex.default(x)", Work(0, 64, 68, known=False)),
    ],
)
def test_bytes_and_operations(inputs: str, call: str, want: Work):
    assert work(node(inputs, call).nodes[0]) == want


def test_symbolic_sizes_and_whole_graphs():
    s0 = size_symbol("s0")
    graph = parse_graph(
        'graph(level="tensor", symbols={"s0": (2, None, 8)})\n'
        'def f(x: "f32[s0,6]", w: "f32[6,8]"):\n    a = aten.mm.default(x, w)\n    b = aten.relu.default(a)\n'
        "    return (b,)\n"
    )
    total = graph_work(graph)
    assert total.flops == 96 * s0 + 8 * s0
    assert total.at({s0: 4}) == Work(96 * 4 + 32, 4 * 24 + 192 + 128, 128 + 128, fma=96 * 4)
    assert total.bytes == total.read + total.written
    assert size_bytes(TensorType((4, 6), torch.float32, "cpu", (0, 1))) == 24


def test_regions():
    graph = parse_graph(
        """
def f(p: "b1[]", x: "f32[4]"):
    def yes(x: "f32[4]"):
        a = aten.exp.default(x)
        return (a,)
    def no(x: "f32[4]"):
        a = aten.neg.default(x)
        return (a,)
    r = plait.cond(p, yes, no, (x,))  # f32[4]
    return (r,)
"""
    )
    assert work(graph.nodes[0]) == Work(4 * SPECIAL, 16, 16)
