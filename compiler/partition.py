"""Cuts a joint graph into forward and backward: which values the forward saves and which the backward computes again.

A minimum cut over times of plait's cost model. Saving a value costs its way to memory (unless the forward stores it anyway)
and back; computing it again costs its operations, which fuse into the reader, and both ways of the memory where the reader
is a library or a product. What is no elementwise op, view or small reduction is never computed again. Programs with torch's
own tags (`torch.utils.checkpoint`, memory budgets), random state or control flow are cut by torch.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch.compile_utils import fx_graph_cse, raise_getitems
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils.checkpoint import CheckpointPolicy

from ..codegen.ceilings import ceilings
from ..cost.ops import work
from ..cost.profile import open_table, user_path
from ..errors import CannotImport
from ..ir import Node, from_fx
from ..ir.fx import FxLinks
from .capture import real_tensors

Parts = tuple[GraphModule, GraphModule]

_NEVER = 1 << 60
_PICO = 1e12
_UNKNOWN = 4096  # what a size that only data decide counts as
_SHARE_OF_PEAK = 4  # elementwise kernels reach this part of the rate of fused multiply-adds
_AGAIN = frozenset(
    f"aten.{n}"
    for n in ("sum", "mean", "amax", "amin", "var", "var_mean", "native_layer_norm", "_softmax", "_log_softmax", "clone",
              "_to_copy", "full", "full_like", "arange", "zeros_like", "ones_like", "cat", "scalar_tensor")
)  # fmt: skip


def partition(joint: GraphModule, inputs: Any, recompute: str, **how: Any) -> Parts:
    """Forward and backward of a joint graph under AOTAutograd's contract. `recompute` is "torch" for torch's min-cut, "cost"
    for plait's, "none" to save all that the backward reads."""
    if recompute == "torch" or _torchs(joint):
        return min_cut_rematerialization_partition(joint, inputs, **how)
    joint.graph.eliminate_dead_code()
    joint.graph = fx_graph_cse(joint.graph)
    partitioners.force_save_effectful_ops(joint)
    partitioners.force_save_bw_mutation_src(joint)
    info = partitioners.classify_nodes(joint, how.get("static_lifetime_input_indices") or [], how["num_fwd_outputs"])
    try:
        costs = _Costs(joint, info, again=recompute == "cost")
    except CannotImport:
        costs = None
    if costs is None or not info.required_bw_nodes:
        return min_cut_rematerialization_partition(joint, inputs, **how)
    saved = costs.cut()
    parts = partitioners._extract_fwd_bwd_modules(
        joint,
        [n for n in saved if not _is_size(n)],
        saved_sym_nodes=[n for n in saved if _is_size(n)],
        num_fwd_outputs=how["num_fwd_outputs"],
        static_lifetime_input_nodes=info.static_lifetime_input_nodes,
    )
    forward, backward = parts[0], partitioners.reordering_to_mimic_autograd_engine(parts[1])
    return raise_getitems(forward), raise_getitems(backward)


def saved_bytes(forward: GraphModule, outputs: int) -> int:
    """Bytes that a forward keeps for its backward besides its inputs; sizes that may change count as in the example."""
    (results,) = forward.graph.output_node().args
    assert isinstance(results, tuple | list)
    kept = dict.fromkeys(n for n in results[outputs:] if isinstance(n, FxNode) and n.op != "placeholder")
    return sum(_bytes(n) for n in kept)


def _torchs(joint: GraphModule) -> bool:
    """Whether a program says itself what to save, or holds what only torch's partitioner knows how to place."""
    if functorch_config.activation_memory_budget != 1.0 or partitioners.has_recomputable_ops(joint):
        return True
    for n in joint.graph.nodes:
        if partitioners._get_memory_budget_annotation(n) is not None or "memory_budget" in n.meta:
            return True
        if partitioners._must_be_in_forward(n) or partitioners._must_be_in_backward(n):
            return True
        if partitioners._is_fwd_seed_offset(n) or partitioners._is_bwd_seed_offset(n) or partitioners._is_backward_state(n):
            return True
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            return True
    return False


def _is_size(n: FxNode) -> bool:
    return isinstance(n.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def _number(size: Any) -> int:
    """A size, as in the example where it may change."""
    if isinstance(size, int):
        return size
    return size.node.hint if isinstance(size.node.hint, int) else _UNKNOWN


def _bytes(n: FxNode) -> int:
    value = n.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        count *= 1 if isinstance(stride, int) and stride == 0 else _number(size)
    return count * value.dtype.itemsize


class _Costs:
    """Picoseconds of saving and of computing again, for every node that the forward could compute."""

    def __init__(self, joint: GraphModule, info: Any, *, again: bool) -> None:
        self.info, self.again = info, again
        self.nodes: Sequence[FxNode] = [n for n in joint.graph.nodes if n.op != "output"]
        links = FxLinks()
        producers = from_fx(joint, "joint", links).producers
        found = {n: producers.get(v) for n, v in (*links.values.items(), *links.calls.items())}
        self.made: Mapping[FxNode, Node] = {n: p for n, p in found.items() if p is not None}
        self.sizes = {
            s.node.expr.name: _number(s)
            for n in self.nodes
            for s in getattr(n.meta.get("val"), "shape", ())
            if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol
        }
        table = open_table(user_path())
        with real_tensors():
            machine = ceilings(table, torch.get_num_threads())
        table.save()
        self.byte, self.flop = _PICO / machine.levels[-1].read, _SHARE_OF_PEAK * _PICO / machine.fma

    def fuses(self, n: FxNode) -> bool:
        """Whether a node becomes part of the kernel that reads it."""
        made = self.made.get(n)
        return n.target is operator.getitem or (
            made is not None and (made.op.has("elementwise") or made.op.has("view") or made.op.base in _AGAIN)
        )

    def repeatable(self, n: FxNode) -> bool:
        if n.op != "call_function" or n.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
            return n.op == "get_attr"
        if _is_size(n):
            return True
        made = self.made.get(n)
        if made is not None and (made.token is not None or made.op.effect is not None):
            return False
        copy = made is not None and made.op.base == "aten.clone" and n.all_input_nodes[0].op == "placeholder"
        return self.again and self.fuses(n) and not copy  # the copy is taken because the input changes

    def save(self, n: FxNode) -> int:
        """The way to memory and back."""
        if _is_size(n):
            return 1
        if not isinstance(n.meta.get("val"), torch.Tensor):
            return _NEVER
        ways = 1 if self.stored(n) else 2
        view = 1 if (m := self.made.get(n)) is not None and m.op.has("view") else 0  # rather what it is a view of
        return int(ways * _bytes(n) * self.byte) + 2 + view

    def stored(self, n: FxNode) -> bool:
        """Whether the forward has a value in memory anyway."""
        if n.op != "call_function" or not self.fuses(n):
            return True
        readers = [u for u in self.readers(n) if u.op == "output" or self.info.is_required_fw(u)]
        return any(u.op == "output" or not self.fuses(u) for u in readers)

    def readers(self, n: FxNode) -> list[FxNode]:
        """What reads a value, through views too."""
        found: list[FxNode] = []
        for u in n.users:
            made = self.made.get(u)
            found += self.readers(u) if made is not None and made.op.has("view") else [u]
        return found

    def compute(self, n: FxNode) -> int:
        """Computing a value in the backward, its operands at hand."""
        made = self.made.get(n)
        if made is None or _is_size(n) or n.op == "get_attr" or n.target is operator.getitem or made.op.has("view"):
            return 0
        flops = work(made).flops
        if not isinstance(flops, int):
            flops = int(flops.subs({s: self.sizes.get(s.name, _UNKNOWN) for s in flops.free_symbols}))
        alone = any(u in self.info.required_bw_nodes and not self.fuses(u) for u in self.readers(n))
        return int(flops * self.flop) + (int(2 * _bytes(n) * self.byte) if alone else 0) + 1

    def cut(self) -> list[FxNode]:
        """The values to save, in the order of the graph."""
        import networkx

        net = networkx.DiGraph()
        gradients = self.info.tangents_closure
        for n in self.nodes:
            into, out = (n.name, "in"), (n.name, "out")
            if n in gradients:
                net.add_edge(into, "backward", capacity=_NEVER)
            else:
                anew = self.compute(n) if self.repeatable(n) else _NEVER
                unclaimed = not self.info.is_required_fw(n) and anew != _NEVER
                net.add_edge("forward", into, capacity=0 if unclaimed else anew)
                net.add_edge(into, out, capacity=self.save(n) + (anew if unclaimed else 0))
                if n in self.info.required_bw_nodes:
                    net.add_edge(out, "backward", capacity=_NEVER)
            for used in n.all_input_nodes:
                if used not in gradients:
                    net.add_edge((used.name, "out"), into, capacity=_NEVER)
        _, (kept, _) = networkx.minimum_cut(net, "forward", "backward")
        return [n for n in self.nodes if n not in gradients and (n.name, "in") in kept and (n.name, "out") not in kept]


__all__ = ["partition", "saved_bytes"]
