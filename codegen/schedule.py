"""The scheduler: decides what becomes a kernel, a library call, a fallback or a view, and in which order."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import CannotLower
from ..ir import Graph, Node, TensorType, Value, flatten, op
from ..ir.rewrite import RuleLog
from ..runtime import moe as runtime_moe
from ..runtime import ops as runtime_ops
from ..runtime.pending import EXCHANGES
from .allow import Allow, always
from .analysis import Analysis
from .attention import emit_attention
from .convolution import NAME as CONVOLUTION
from .convolution import reordered_call, reordered_weight
from .emit import emit, emit_matmul
from .emit_gpu_matmul import emit_gpu_matmul
from .emit_ordered import emit_ordered
from .expand import expand
from .expert import emit_expert
from .groups import Group, Grouping
from .in_place import replaced, with_write_backs, without
from .items import AliasItem, CallItem, Item, KernelItem, Scheduled
from .matmul import Matmul, matmul_of
from .moe import emit_moe
from .repeats import Repeats
from .target import CPU, Target
from .templates.matmul_choice import ONEDNN
from .tuning import default_choice, linear_call, measured_choice
from .unbacked import bind_sizes
from .unread import received_alone
from .waits import with_waits

assert runtime_ops is not None and runtime_moe is not None  # importing registers the ops `plait.*` that plans call


def schedule_calls(graph: Graph) -> Scheduled:
    """Every node as a call of its torch op: the form of region bodies."""
    graph = bind_sizes(with_waits(graph))
    nodes = [n for n in graph.nodes if n.op.name != "plait.constant"]
    return Scheduled(graph, tuple(CallItem(n, "fallback", "region bodies run op by op") for n in nodes))


def schedule(
    graph: Graph,
    *,
    generate: bool = True,
    target: Target = CPU,
    measured: bool = False,
    allow: Allow = always,
    log: RuleLog | None = None,
) -> Scheduled:
    """Fuse a tensor-level graph into kernels and calls. Mutated inputs are written by the kernel that computes what they
    become where that is safe (`in_place`), else at the end. With `measured` each matmul goes to the fastest of the template
    and the libraries, without it to the template, unless the processor multiplies its dtype in a way that only a library
    uses."""
    graph = bind_sizes(with_write_backs(with_waits(expand(graph, allow, log) if generate else graph)))
    choose = None
    if target.kind == "cpu":
        choose = measured_choice(graph.symbols, graph.producers) if measured else default_choice(graph.symbols)
    analysis = Analysis(graph, generate=generate, target=target, choose=choose, allow=allow)
    grouping = Grouping(analysis)
    copies = replaced(analysis, grouping)
    stored = _stored(analysis, grouping)
    graph = without(graph, copies)
    items: list[Item] = []
    scratch: list[Value] = []
    homes = {v: (graph.inputs[i], 0) for i, v in graph.writes} | analysis.parts
    joined = {home for home, _ in analysis.parts.values()}
    status = Value(TensorType((1,), torch.int64, analysis.device), "status") if analysis.checks_rows else None
    late: list[Item] = []
    repeats = Repeats(analysis, stored, status)
    for item in grouping.ordered():
        if isinstance(item, Group):
            if not any(v in stored and v not in copies for u in item.units for v in u.values):
                continue  # nobody reads what it computes: only its sizes mattered
            if item.units[0].value in joined:
                continue  # its parts are computed there
            nodes = tuple(dict.fromkeys(n for u in item.units for n in _covered(analysis, u.node)))
            kernel = repeats.item(item, nodes, lambda g=item, n=nodes: _kernel_item(analysis, g, n, stored, status))
            if item.units[0].operands and target.kind == "cpu":
                scratch += kernel.buffers[len(kernel.buffers) - item.units[0].scratch :]
            (late if any(u.value in grouping.last for u in item.units) else items).append(kernel)
        else:
            kind, reason = analysis.calls[item]
            items.append(CallItem(_implementation(analysis, item), kind, reason))
    items += late
    items += [AliasItem(v, m.root, m.offset) for v, m in analysis.aliases.items()]
    if status is not None:
        scratch.append(status)
        items = [_clear(status), *items, _check(status)]
    laid_out = {**dict(analysis.panels.values()), **analysis.reordered}
    return Scheduled(graph, tuple(items), tuple(scratch), homes, laid_out)


def _with_reordered_weight(analysis: Analysis, node: Node) -> Node:
    """A convolution with its weight laid out for oneDNN once, where the weight is the graph's own."""
    origin = analysis.graph.producers.get(node["weight"])
    if origin is None or origin.op.name != "plait.constant":
        return node
    found = reordered_weight(node, origin.args[0], analysis.graph.symbols)
    if found is None or not analysis.allow("pack", "reorder", origin):
        return node
    weight = next((v for v, known in analysis.reordered.items() if known == found), None)
    if weight is None:
        weight = Value(node["weight"].type, f"{node['weight'].hint}_reordered")
        analysis.reordered[weight] = found
    return reordered_call(node, weight)


def _implementation(analysis: Analysis, node: Node) -> Node:
    """The call that runs a node: its own op; one that counts from where a value begins, not from where memory does; oneDNN's
    where that was measured to be the fastest, or where the graph owns a convolution's weight."""
    if node.op.name in _ADDRESSING:
        return _addressing(analysis, node)
    if node.op.name in EXCHANGES and analysis.allow("unread", "unread", node) and received_alone(node, analysis.graph):
        at = node.op.index["clear"]
        return replace(node, args=(*node.args[:at], False, *node.args[at + 1 :]))
    if node.op.name == CONVOLUTION and analysis.target.kind == "cpu":
        return _with_reordered_weight(analysis, node)
    made = matmul_of(node)
    if analysis.chosen.get(node) != ONEDNN or not isinstance(made, Matmul):
        return node
    call = linear_call(node, made, analysis.graph.producers)
    assert call is not None, "only a product that oneDNN can take is given to it"
    return call


_ADDRESSING = ("aten.as_strided.default", "aten.as_strided_copy.default", "aten.as_strided_scatter.default")


def _addressing(analysis: Analysis, node: Node) -> Node:
    """A call of an op that addresses the memory of its operand. Inputs lie where the caller put them, as torch sees them."""
    source: Value = node["self"]
    home = analysis.memory[source]
    maker = analysis.graph.producers.get(home.root)
    if maker is None:
        return node
    if maker in analysis.calls and maker.op.has("view"):
        raise CannotLower(what=node.op.name, why="what it addresses is a view that torch makes", source=node.loc.short)
    offset = home.offset if node["storage_offset"] is None else node["storage_offset"]
    place = (node["size"], node["stride"], offset)
    if node.op.name != "aten.as_strided_scatter.default":
        return Node(op("plait.as_strided.default"), (home.root, *place), node.outputs, (), node.loc)
    own = (source.tensor.shape, home.strides, home.offset)
    args = (home.root, node["src"], *place, *own)
    return Node(op("plait.as_strided_scatter.default"), args, node.outputs, (), node.loc)


def _stored(analysis: Analysis, grouping: Grouping) -> set[Value]:
    """Units that are read from memory: by calls, other groups, through views, or as results."""
    found: set[Value] = set()

    def note(v: Value) -> None:
        home = analysis.memory.get(v)
        if home is not None and home.root in analysis.units:
            found.add(home.root)

    for v in flatten(analysis.graph.outputs):
        if isinstance(v, Value):
            note(v)
    for _, v in analysis.graph.writes:
        note(v)
    for item in grouping.items:
        if isinstance(item, Node):
            for v in item.inputs:
                note(v)
        else:
            for u in item.units:
                for v in u.operands:
                    note(v)
                for v, _ in u.reads:
                    if v not in item.form:
                        note(v)
    return found


def _kernel_item(
    analysis: Analysis, group: Group, nodes: tuple[Node, ...], stored: set[Value], status: Value | None
) -> KernelItem:
    if group.matmul is not None:
        emit_template = emit_matmul if analysis.target.kind == "cpu" else emit_gpu_matmul
        return replace(emit_template(analysis, group, stored, status), nodes=nodes)
    first = group.units[0]
    if first.attention is not None:
        return emit_attention(first.attention, first.values, stored, first.node)
    if first.expert is not None:
        return emit_expert(first.expert, first.node, clear=first.value not in analysis.unread)
    if first.moe is not None:
        return emit_moe(first.moe, status, first.node, clear=first.value not in analysis.unread)
    made = emit_ordered(analysis, group, stored, status) if first.alone else emit(analysis, group, stored, status)
    # what a kernel writes and then reads again it does not read from before
    own = made.scratch | {v for u in group.units for v in u.values}
    access = tuple(
        "write" if v in own and v not in group.in_place else b.access
        for v, b in zip(made.buffers, made.kernel.buffers, strict=True)
    )
    return KernelItem(made.kernel.name, made.buffers, access, made.kernel.sizes, nodes, made.kernel)


def _covered(analysis: Analysis, node: Node) -> list[Node]:
    """A unit's node and the nodes inlined into it."""
    found = [node]
    todo = list(node.inputs)
    while todo:
        inlined = analysis.inlined.get(todo.pop())
        if inlined is not None and inlined not in found:
            found.append(inlined)
            todo.extend(inlined.inputs)
    return found


def _clear(status: Value) -> CallItem:
    return CallItem(Node(op(runtime_ops.CLEAR_STATUS), (status,), ()), "internal", "clears the status word")


def _check(status: Value) -> CallItem:
    return CallItem(Node(op(runtime_ops.CHECK_ROWS), (status,), ()), "internal", "raises for row ids out of range")
