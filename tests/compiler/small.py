"""A small compiled model for tests of artifacts and of the command line."""

from __future__ import annotations

import torch
from plait.codegen.compile import compile_graph
from plait.compiler.aot import Ready
from plait.ir import parse_graph
from plait.passes.base import Context, run_pipeline
from plait.passes.prune import Prune
from torch.utils import _pytree as pytree

TEXT = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def forward(x: "f32[s0,4]"):
    w = plait.constant("w")
    unused = aten.exp.default(x)
    add = aten.add.Tensor(x, w)
    act = aten.relu.default(add)
    sort, order = aten.sort.default(act)
    return (act, sort, s0)
"""


def ready(w3: float = 2.0) -> Ready:
    captured = parse_graph(TEXT, {"w": torch.tensor([-1.0, 0.0, 1.0, w3])})
    graph, history = run_pipeline(captured, [Prune()], Context())
    _, in_tree = pytree.tree_flatten(((torch.zeros(1),), {}))
    _, out_tree = pytree.tree_flatten({"act": 0, "sorted": (0, 0)})
    return Ready(compile_graph(graph), captured, history, in_tree, out_tree, {"name": "small"})


def expected(x: torch.Tensor) -> dict[str, object]:
    act = torch.relu(x + torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    return {"act": act, "sorted": (act.sort().values, x.shape[0])}
