"""Ranks of a training step: which they are, and the collectives that average its gradients.

before:  g1 = mm(...); ...; g0 = mm(...); ...; return (loss, g0, g1)
after:   g1 = mm(...); ...; g0 = mm(...); sent = all_reduce(cat(g1, g0), "sum", group); ...; mean = wait_tensor(sent) / ranks
         return (loss, mean[n:], mean[:n])

Buckets hold gradients of one dtype, in the order in which the graph computes them. Each is sent where its last gradient is
there and waited for at the end, so that what lies between runs meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.fx import Node as FxNode
from torch.fx.node import map_arg

from ...errors import BadMesh
from .joint import Joint

aten: Any = torch.ops.aten

BROADCAST = 64 << 20
"""Bytes of parameters that are broadcast at once."""


@dataclass(frozen=True)
class Ranks:
    """A process group of several ranks; `name` is what torch calls it in graphs."""

    group: distributed.ProcessGroup
    name: str
    count: int

    @staticmethod
    def of(mesh: Any) -> Ranks | None:
        """The ranks of a user's mesh; None for a single process. Raises BadMesh."""
        if mesh is None:
            return None
        group = mesh
        if distributed.is_available() and isinstance(mesh, distributed.DeviceMesh):
            if mesh.ndim != 1:
                raise BadMesh(got=f"a DeviceMesh of {mesh.ndim} dimensions")
            group = mesh.get_group()
        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise BadMesh(got=f"{mesh!r}")
        count = group.size()
        return Ranks(group, group.group_name, count) if count > 1 else None

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give these tensors the values that they have on the first rank, in place."""
        if tensors:
            distributed._broadcast_coalesced(self.group, [t.detach() for t in tensors], BROADCAST, 0)


def average(joint: Joint, ranks: Ranks, is_local: Callable[[int], bool], limit: int) -> None:
    """Let a step return the mean of its gradients over ranks, sent in buckets of up to `limit` bytes.

    Gradients of inputs with `is_local` stay on their rank: each rank holds other parameters there, whose gradient already
    sums over the batches of all ranks, so that it is divided only.
    """
    order = {n: i for i, n in enumerate(joint.module.graph.nodes)}
    found = sorted(joint.gradients.items(), key=lambda item: order[item[1]])
    kept = [(i, g) for i, g in found if is_local(i)]
    sent = [_Bucket(joint, ranks, of, order) for of in _buckets([(i, g) for i, g in found if not is_local(i)], limit)]
    output = joint.module.graph.output_node()
    new = {i: _call(joint, output, g, aten.div.Tensor, g, ranks.count) for i, g in kept}
    for bucket in sent:
        new.update(bucket.received(output))
    joint.replace_gradients(new)


def _buckets(gradients: Sequence[tuple[int, FxNode]], limit: int) -> list[list[tuple[int, FxNode]]]:
    """Gradients that travel together. What is larger than a bucket travels alone."""
    done: list[list[tuple[int, FxNode]]] = []
    filling: dict[torch.dtype, list[tuple[int, FxNode]]] = {}
    for i, g in gradients:
        kind = g.meta["val"].dtype
        bucket = filling.get(kind)
        if bucket is None or sum(_bytes(other) for _, other in bucket) + _bytes(g) > limit:
            bucket = filling[kind] = []
            done.append(bucket)
        bucket.append((i, g))
    return done


def _bytes(n: FxNode) -> int:
    return n.meta["val"].numel() * n.meta["val"].element_size()


class _Bucket:
    """Gradients `of` inputs on their way to the other ranks. The graph sends them from its construction on."""

    def __init__(self, joint: Joint, ranks: Ranks, of: Sequence[tuple[int, FxNode]], order: dict[FxNode, int]) -> None:
        self.joint, self.ranks, self.of = joint, ranks, of
        last = max((g for _, g in of), key=lambda g: order[g])
        self.like = last
        at = last.next
        while at.op == "placeholder":
            at = at.next
        parts = [self._flat(at, g) for _, g in of]
        flat = parts[0] if len(parts) == 1 else _call(joint, at, last, aten.cat.default, parts)
        self.sent = _call(joint, at, last, torch.ops._c10d_functional.all_reduce.default, flat, "sum", ranks.name)

    def _flat(self, at: FxNode, g: FxNode) -> FxNode:
        if not g.meta["val"].is_contiguous():
            g = _call(self.joint, at, g, aten.clone.default, g, memory_format=torch.contiguous_format)
        return _call(self.joint, at, g, aten.view.default, g, [-1])

    def received(self, at: FxNode) -> dict[int, FxNode]:
        """The mean of each gradient, waited for before node `at`."""
        summed = _call(self.joint, at, self.like, torch.ops._c10d_functional.wait_tensor.default, self.sent)
        mean = _call(self.joint, at, self.like, aten.div.Tensor, summed, self.ranks.count)
        means: dict[int, FxNode] = {}
        begin = 0
        for i, g in self.of:
            shape = list(g.meta["val"].shape)
            end = begin + g.meta["val"].numel()
            part = mean if len(self.of) == 1 else _call(self.joint, at, g, aten.slice.Tensor, mean, 0, begin, end)
            means[i] = _call(self.joint, at, g, aten.view.default, part, shape)
            begin = end
        return means


def _call(joint: Joint, at: FxNode, like: FxNode, target: Any, *args: Any, **kwargs: Any) -> FxNode:
    """A new node before `at`, typed, with the source line of `like`."""
    with joint.module.graph.inserting_before(at):
        made = joint.module.graph.call_function(target, args, kwargs)
    made.meta = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
    given, named = map_arg((args, kwargs), lambda n: n.meta["val"])
    with like.meta["val"].fake_mode, torch.no_grad():
        made.meta["val"] = target(*given, **named)
    return made
