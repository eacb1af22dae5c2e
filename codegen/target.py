"""What code is generated for, and graphs that were captured on the CPU as graphs of another device.

A graph says on which device each of its values lies. `retarget` moves all of them, so that a machine without a GPU
compiles what a machine with one runs. Constants stay tensors of the CPU: whoever runs the graph moves them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CannotRetarget, UnknownTarget
from ..ir import Graph, Node, TensorType, Value, bind, map_arg, op
from ..ir.op import Op

CUDA_DEVICE = "cuda:0"
"""Where retargeted graphs run: the first device, until a plan is placed on another one."""


@dataclass(frozen=True)
class Target:
    """A kind of device to generate code for: "cpu", or "cuda:90" for CUDA devices of compute capability 9.0."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda:\d{2,3}", self.name):
            raise UnknownTarget(target=self.name)

    @property
    def kind(self) -> str:
        """torch's name of the kind of device: "cpu" or "cuda"."""
        return self.name.partition(":")[0]

    def device(self, graph: Graph) -> str:
        """The device of `graph` for which kernels are generated: the first of the target's kind that a value lies on."""
        values = (*graph.inputs, *(v for n in graph.nodes for v in n.results))
        devices = (v.type.device for v in values if isinstance(v.type, TensorType))
        return next((d for d in devices if torch.device(d).type == self.kind), "cpu" if self.kind == "cpu" else CUDA_DEVICE)


CPU = Target("cpu")


#: Ops of ATen that torch implements for dense tensors on CPUs only.
CPU_ONLY = frozenset(
    f"aten.{name}"
    for name in (
        "_add_relu.Scalar", "_add_relu.Tensor", "_convert_weight_to_int4pack_for_cpu.default",
        "_dyn_quant_matmul_4bit.default", "_dyn_quant_pack_4bit_weight.default", "_empty_affine_quantized.default",
        "_empty_per_channel_affine_quantized.default", "_functional_assert_async.msg", "_histogramdd_bin_edges.default",
        "_histogramdd_from_bin_cts.default", "_histogramdd_from_bin_tensors.default", "_make_dep_token.default",
        "_scaled_dot_product_flash_attention_for_cpu.default",
        "_scaled_dot_product_flash_attention_for_cpu_backward.default", "_spdiags.default",
        "_upsample_lanczos2d_aa.default", "_upsample_lanczos2d_aa_backward.default",
        "_upsample_lanczos2d_aa_backward.grad_input", "_weight_int4pack_mm_for_cpu.default", "from_file.default",
        "histogram.bin_ct", "histogram.bins_tensor", "mkldnn_rnn_layer.default", "mkldnn_rnn_layer_backward.default",
        "quantize_per_tensor.tensors", "slow_conv3d_forward.default", "to_mkldnn.default",
    )
)  # fmt: skip

_CPU_LIBRARIES = ("mkl", "mkldnn", "onednn", "prepacked", "quantized")  # namespaces
_ANYWHERE = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")


def _refusal(found: Op) -> str | None:
    """Why an op has no form on a CUDA device; None where it has one."""
    namespace, packet = [*found.name.split("."), ""][:2]
    if namespace in _CPU_LIBRARIES or "mkldnn" in packet:
        return "it is oneDNN's or MKL's, which compute on CPUs"
    if found.name in CPU_ONLY:
        return "torch implements it for CPUs only"
    if found.overload is not None and namespace not in ("aten", "prims"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        if not any(has(found.overload.name(), key) for key in _ANYWHERE):
            return f"the library {namespace} has no CUDA kernel for it in this process"
    return None


Replaced = tuple[Op, tuple[Any, ...], tuple[Value, ...]]
"""The op, arguments and outputs that stand in for a node."""


def _attention(node: Node, graph: Graph) -> Replaced:
    """CPU attention as torch's attention of any device, which picks its kernel by dtypes and sizes when it runs."""
    if node.outputs[1] in graph.users or node.outputs[1] in graph.results:
        why = "its second result is read, which the backward of CPU attention alone takes"
        raise CannotRetarget(op=node.op.name, device="CUDA devices", why=why, source=node.loc.short or None)
    general = op("aten.scaled_dot_product_attention.default")
    query, key, value, dropout, causal = node.args[:5]
    args = bind(
        general,
        (query, key, value, node["attn_mask"], dropout, causal),
        {"scale": node["scale"], "enable_gqa": query.tensor.shape[1] != key.tensor.shape[1]},
    )
    return general, args, (node.outputs[0], *node.outputs[2:])


_REPLACED: dict[str, Callable[[Node, Graph], Replaced]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
}


def retarget(graph: Graph, device: str = CUDA_DEVICE) -> Graph:
    """`graph`, captured on the CPU, as the same program with all its values on `device`, a CUDA device.

    Raises CannotRetarget for an op that only CPUs have. Random draws come from the device's generator, so a seed gives
    other numbers than on the CPU.
    """
    return _Move(device).graph(graph)


class _Move:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.values: dict[Value, Value] = {}

    def graph(self, graph: Graph) -> Graph:
        inputs = tuple(map(self.value, graph.inputs))
        nodes = tuple(self.node(n, graph) for n in graph.nodes)
        outputs = tuple(map_arg(a, self.leaf) for a in graph.outputs)
        writes = tuple((i, self.value(v)) for i, v in graph.writes)
        return graph.replace(inputs=inputs, nodes=nodes, outputs=outputs, writes=writes)

    def value(self, value: Value) -> Value:
        if value not in self.values:
            kind = value.type
            moved = kind.with_(device=str(self.device), strides=kind.strides) if isinstance(kind, TensorType) else kind
            self.values[value] = Value(moved, value.hint)
        return self.values[value]

    def leaf(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self.value(arg)
        if isinstance(arg, torch.device):
            return self.device
        return self.graph(arg) if isinstance(arg, Graph) else arg

    def node(self, node: Node, graph: Graph) -> Node:
        found, args, outputs, loc = node.op, node.args, node.outputs, node.loc
        if found.name in _REPLACED:
            found, args, outputs = _REPLACED[found.name](node, graph)
            loc = loc.by("retarget")
        why = _refusal(found)
        if why is not None:
            raise CannotRetarget(op=found.name, device="CUDA devices", why=why, source=loc.short or None)
        args = tuple(self.argument(p.name, a) for p, a in zip(found.params, args, strict=True))
        return Node(found, args, tuple(map(self.value, outputs)), tuple(map(self.value, node.after)), loc)

    def argument(self, name: str, arg: Any) -> Any:
        """An argument on the new device: device arguments name it, also where torch's default was meant."""
        if name == "device" and arg is None:
            return self.device
        if name == "pin_memory" and arg is True:
            return False  # pinned memory is the CPU's
        return map_arg(arg, self.leaf)
