"""Which nodes of a range can be cut into pieces that run one after the other, and along what.

A range holds MoE layers: exchanges that dispatch tokens to their experts, and those that bring the results back. How each
value is cut follows from constraints that are propagated through the range: those of the layer's own ops, which are fixed,
and the axis rules of all others (`ir/axes.py`). Two ways of cutting a layer:

- "tokens": along the tokens of this rank. Buffers of experts are not sliced: each piece has a buffer of the whole size with
  rows of its own tokens only (an irregular axis: what a piece holds is known when it runs). Used capacity is handed from
  piece to piece, so that every token goes where it goes in the whole program, and the same tokens are dropped.
- "capacity": along the rows of the experts' buffers, between the two exchanges only; how a layer is cut by Tutel.

Nodes of the range that nothing is cut through run before the pieces where these need them, else after them. Where they need
all pieces of something themselves, such as a gate that ranks all tokens or a loss that balances experts by their counts,
they run between two stages of the pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import gcd
from typing import Literal

from ...ir import Graph, Node, Reason, TensorType, Value
from ...ir.axes import AxisMap, axes

Mode = Literal["tokens", "capacity"]

EXCHANGE = "plait.all_to_all_capacity.default"
SLOTS, ENCODE, DECODE = "plait.moe_slots.default", "plait.moe_encode.default", "plait.moe_decode.default"
DECODE_WEIGHT = "plait.moe_decode_weight.default"
PRODUCT, ACTIVATION = "plait.expert_mm.default", "plait.expert_act.default"
ACTIVATION_BACKWARD = "plait.expert_act_backward.default"


@dataclass(frozen=True, slots=True)
class Along:
    """Slices of one axis."""

    dim: int


class Whole(Enum):
    """Values that are not sliced although each piece has its own."""

    ROWS = "a buffer of the whole size with the rows of a piece"
    RANGES = "first and end of the rows of a piece"
    WINDOW = "what part of first and end lies in the slice of a piece"
    CARRIED = "handed from one piece to the next"


Cut = Along | Whole


@dataclass(frozen=True, slots=True)
class Layer:
    """An MoE layer: its dispatch and its combine."""

    dispatch: Node
    combine: Node


@dataclass(frozen=True)
class Cutting:
    """How a range is cut: nodes that run before the pieces, in pieces, between stages of these, and after them, each in the
    order of the graph; how values are cut; letters of the nodes that have an axis rule; `unit`, which every axis that is cut
    is a multiple of; `reasons` why nodes are not cut."""

    before: tuple[Node, ...]
    cut: tuple[Node, ...]
    between: tuple[Node, ...]
    after: tuple[Node, ...]
    cuts: Mapping[Value, Cut]
    letters: Mapping[Node, str]
    unit: int
    reasons: Mapping[Node, Reason] = field(default_factory=dict[Node, Reason])


def layers(graph: Graph, nodes: Iterable[Node]) -> list[Layer]:
    """MoE layers among nodes of a forward, or of a backward, where gradients take the same ways.

    What the second exchange of a layer sends are the rows that came with the first.
    """
    mine = set(nodes)
    found: list[Layer] = []
    for node in graph.nodes:
        if node not in mine or node.op.name != EXCHANGE:
            continue
        sent = graph.producers.get(told(graph, node["rows"]))
        combine = None if sent is not None and sent.op.name == EXCHANGE else _first_exchange(graph, node, mine)
        if combine is not None:
            found.append(Layer(node, combine))
    return found


def told(graph: Graph, rows: Value) -> Value:
    """The ranges that some value is: an exchange gives what it was told to expect."""
    while (node := graph.producers.get(rows)) is not None and node.op.name == EXCHANGE and node["expected"] is not None:
        rows = node["expected"]
    return rows


def _first_exchange(graph: Graph, dispatch: Node, mine: set[Node]) -> Node | None:
    """The exchange that sends back the rows which a dispatch received, found through the experts."""
    received = told(graph, dispatch.results[1])
    todo, seen = deque([dispatch]), {dispatch}
    while todo:
        for v in todo.popleft().results:
            for user in graph.users.get(v, ()):
                if user in seen or user not in mine:
                    continue
                if user.op.name == EXCHANGE:
                    if told(graph, user["rows"]) is received:
                        return user
                    continue
                seen.add(user)
                todo.append(user)
    return None


def between(graph: Graph, layer: Layer, nodes: Sequence[Node]) -> list[Node]:
    """Nodes on the ways from a layer's dispatch to its combine, both included."""
    after: set[Node] = {layer.dispatch}
    for node in nodes:
        if any(graph.producers.get(v) in after for v in node.inputs):
            after.add(node)
    before: set[Node] = {layer.combine}
    for node in reversed(nodes):
        if any(user in before for v in node.results for user in graph.users.get(v, ())):
            before.add(node)
    return [node for node in nodes if node in after and node in before]


# -- what each node demands -------------------------------------------------------------------------------------------


Relation = Callable[[Node, Mode], Mapping[Value, Cut]]
AxesOf = Callable[[Node], AxisMap | Reason]


def _named(node: Node, **cuts: Cut) -> dict[Value, Cut]:
    return {node[name]: cut for name, cut in cuts.items() if isinstance(node.get(name), Value)}


def _buffer(mode: Mode) -> tuple[Cut, Cut]:
    """How a buffer [G, C, h] is cut, and the ranges that say what is used of it."""
    return (Whole.ROWS, Whole.RANGES) if mode == "tokens" else (Along(1), Whole.WINDOW)


def _exchange(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    rows, ranges = _buffer(mode)
    found = _named(node, buf=rows, rows=ranges, expected=ranges)
    return {**found, node.results[0]: rows, node.results[1]: ranges}


def _on_rows(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    rows, ranges = _buffer(mode)
    buffers = (v for v in node.results if v.tensor.rank == 3)  # one has no elements where an operand is not there
    return {**_named(node, grad=rows, x=rows, other=rows, rows=ranges), **dict.fromkeys(buffers, rows)}


def _slots(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    slot, used, rows = node.results
    return {**_named(node, choice=Along(0), used=Whole.CARRIED), slot: Along(0), used: Whole.CARRIED, rows: Whole.RANGES}


def _encode(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    tokens = Along(0)
    return {**_named(node, x=tokens, choice=tokens, slot=tokens, weight=tokens), node.out: Whole.ROWS}


def _decode(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    tokens = Along(0)
    return {**_named(node, buf=Whole.ROWS, choice=tokens, slot=tokens, weight=tokens), node.out: tokens}


def _decode_weight(node: Node, mode: Mode) -> Mapping[Value, Cut]:
    tokens = Along(0)
    return {**_named(node, buf=Whole.ROWS, choice=tokens, slot=tokens, grad=tokens), node.out: tokens}


FIXED: Mapping[str, Relation] = {
    EXCHANGE: _exchange, PRODUCT: _on_rows, ACTIVATION: _on_rows, ACTIVATION_BACKWARD: _on_rows, SLOTS: _slots,
    ENCODE: _encode, DECODE: _decode, DECODE_WEIGHT: _decode_weight,
}  # fmt: skip


def _demand(
    node: Node, known: Mapping[Value, Cut], mode: Mode, axes_of: AxesOf
) -> tuple[Mapping[Value, Cut], str, list[int]] | Reason | None:
    """How all values of a node are cut, given some of them, with the letter that is cut and sizes that are cut; None where
    none of its values is."""
    if node.op.name in FIXED and not (mode == "capacity" and node.op.name in (SLOTS, ENCODE, DECODE, DECODE_WEIGHT)):
        found = FIXED[node.op.name](node, mode)
        return found, "", [_size(v, cut.dim) for v, cut in found.items() if isinstance(cut, Along)]
    mine = {v: known[v] for v in (*node.inputs, *node.results) if v in known}
    if not mine:
        return None
    if all(cut is Whole.ROWS for cut in mine.values()):
        return _each_row(node, mine)
    if any(not isinstance(cut, Along) for cut in mine.values()):
        return Reason(f"{node.op.name} reads what only ops of an MoE layer can take in pieces")
    return _by_letter(node, mine, axes_of)


def _size(v: Value, at: int) -> int:
    size = v.tensor.shape[at]
    return size if isinstance(size, int) else 0


def _each_row(node: Node, mine: Mapping[Value, Cut]) -> tuple[Mapping[Value, Cut], str, list[int]] | Reason:
    """Elementwise ops compute each row of a buffer from that row."""
    if not node.op.has("elementwise") or not all(isinstance(v.type, TensorType) for v in node.results):
        return Reason(f"{node.op.name} may mix rows of the experts' buffers")
    shapes = {v.tensor.shape[:2] for v in (*mine, *node.results)}
    if len(shapes) != 1 or any(v.tensor.rank != 3 for v in (*mine, *node.results)):
        return Reason(f"{node.op.name} changes the shape of an expert's buffer")
    return {**mine, **dict.fromkeys(node.results, Whole.ROWS)}, "", []


def _by_letter(
    node: Node, mine: Mapping[Value, Cut], axes_of: AxesOf
) -> tuple[Mapping[Value, Cut], str, list[int]] | Reason:
    if node.token is not None:
        return Reason(f"{node.op.name} has an effect: it would have it once for each piece")
    found = axes_of(node)
    if isinstance(found, Reason):
        return found
    tensors = [v for v in node.inputs if isinstance(v.type, TensorType)]
    made = [v for v in node.results if isinstance(v.type, TensorType)]
    placed = [*zip(tensors, found.operands, strict=True), *zip(made, found.results, strict=True)]
    letters: set[str] = set()
    for v, cut in mine.items():
        for other, labels in placed:
            if other is v:
                assert isinstance(cut, Along)
                if not labels[cut.dim]:
                    return Reason(f"axis {cut.dim} of what {node.op.name} reads has one element")
                letters.add(labels[cut.dim][0])
    if len(letters) != 1:
        return Reason(f"{node.op.name} relates two axes that are both cut")
    (letter,) = letters
    return _labelled(node, found, placed, letter)


def _labelled(
    node: Node, found: AxisMap, placed: Sequence[tuple[Value, tuple[tuple[str, ...], ...]]], letter: str
) -> tuple[Mapping[Value, Cut], str, list[int]] | Reason:
    if letter not in found.free:
        what = "sums along" if letter in found.reduced else "needs the whole of"
        return Reason(f"{node.op.name} {what} the axis that is cut")
    if not found.plain(letter):
        return Reason(f"pieces of {node.op.name} would not be slices")
    cuts: dict[Value, Cut] = {}
    for v, labels in placed:
        at = found.where(letter, labels)
        cut = None if at is None else Along(at)
        if v in cuts and cuts[v] != cut:
            return Reason(f"{node.op.name} reads the same value in two ways")
        if cut is not None:
            cuts[v] = cut
        elif v in node.results:
            return Reason(f"a result of {node.op.name} has no axis to cut")
    size = found.sizes[letter]
    return cuts, letter, [size if isinstance(size, int) else 0]


# -- a range ----------------------------------------------------------------------------------------------------------


class _Propagation:
    """Cuts of values, spread from the nodes of the layer through the range until nothing changes."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], mode: Mode, axes_of: AxesOf) -> None:
        self.graph, self.nodes, self.axes_of = graph, nodes, axes_of
        self.mode: Mode = mode
        self.inside = set(nodes)
        self.cuts: dict[Value, Cut] = {}
        self.own: dict[Node, Mapping[Value, Cut]] = {}
        self.letters: dict[Node, str] = {}
        self.sizes: dict[Node, list[int]] = {}
        self.reasons: dict[Node, Reason] = {}

    def run(self, first: Iterable[Node]) -> None:
        todo = deque(first)
        while todo:
            node = todo.popleft()
            if node in self.letters or node in self.reasons:
                continue
            found = _demand(node, self.cuts, self.mode, self.axes_of)
            if found is None:
                continue
            if isinstance(found, Reason):
                self.reasons[node] = found
                continue
            cuts, letter, sizes = found
            clash = next((v for v, cut in cuts.items() if self.cuts.get(v, cut) != cut), None)
            if clash is not None:
                self.reasons[node] = _otherwise(node, clash)
                continue
            self.own[node], self.letters[node], self.sizes[node] = cuts, letter, sizes
            for v, cut in cuts.items():
                if v not in self.cuts:
                    self.cuts[v] = cut
                    todo.extend(self._near(v))
        for node, cuts in list(self.own.items()):  # values may have been cut after nodes that share them were looked at
            shared = next((v for v in node.inputs if v in self.cuts and v not in cuts), None)
            if shared is not None:
                self.reasons[node] = _otherwise(node, shared)
                del self.own[node], self.letters[node], self.sizes[node]

    def _near(self, v: Value) -> list[Node]:
        made = self.graph.producers.get(v)
        near = [*([made] if made is not None else []), *self.graph.users.get(v, ())]
        return [node for node in near if node in self.inside]


def _otherwise(node: Node, v: Value) -> Reason:
    return Reason(f"{node.op.name} reads a value that is cut in another way", v)


def cutting(
    graph: Graph, nodes: Sequence[Node], inside: Sequence[Layer], mode: Mode = "tokens", axes_of: AxesOf = axes
) -> Cutting | Reason:
    """How the nodes of a range, in the order of the graph, are cut; why not where its layers themselves cannot be. A search
    over ranges gives axis rules that it has looked up before."""
    core = list(dict.fromkeys(node for layer in inside for node in between(graph, layer, nodes)))
    spread = _Propagation(graph, nodes, mode, axes_of)
    fixed = [node for node in nodes if node.op.name in FIXED] if mode == "tokens" else core
    spread.run([*fixed, *core])
    reasons = spread.reasons
    needed = set(core)
    cut = {node for node in nodes if node in spread.letters and (mode == "tokens" or node in needed)}
    _drop_views(graph, nodes, cut)
    first, middle = _needed(graph, nodes, cut)
    for node in core:
        if node not in cut:
            why = reasons.get(node, Reason(f"nothing says how {node.op.name} is cut"))
            return Reason(f"{_place(node)}{why}", why.value)
    inner = [node for node in nodes if node in cut]
    made = {v for node in inner for v in node.results}
    for node in inner:
        for v in node.inputs:
            if v not in made and spread.cuts.get(v) in (Whole.ROWS, Whole.RANGES):
                return Reason(f"{_place(node)}{node.op.name} reads rows of experts that are not computed in pieces", v)
    unit = gcd(*(size for node in inner for size in spread.sizes[node]))
    if unit < 2:
        return Reason("sizes that are cut are not known, or have no common factor")
    known = {*cut, *first, *middle}
    after = tuple(node for node in nodes if node not in known)
    return Cutting(tuple(first), tuple(inner), tuple(middle), after, spread.cuts, spread.letters, unit, reasons)


def _drop_views(graph: Graph, nodes: Sequence[Node], cut: set[Node]) -> None:
    """Take out of `cut` views that no piece reads."""
    for node in reversed(nodes):
        users = (user for v in node.outputs for user in graph.users.get(v, ()))
        if node in cut and node.op.has("view") and not any(user in cut for user in users):
            cut.remove(node)


def _needed(graph: Graph, nodes: Sequence[Node], cut: set[Node]) -> tuple[list[Node], list[Node]]:
    """Nodes that are not cut and that pieces need: those that need no piece themselves, and those that do."""
    wanted: set[Node] = set()
    inside = set(nodes)
    for node in reversed(nodes):
        if node in cut or node in wanted:
            wanted.update(maker for maker in makers(graph, node) if maker in inside and maker not in cut)
    behind: set[Node] = set()
    for node in nodes:
        if node in wanted and any(maker in cut or maker in behind for maker in makers(graph, node)):
            behind.add(node)
    return [n for n in nodes if n in wanted and n not in behind], [n for n in nodes if n in behind]


def makers(graph: Graph, node: Node) -> list[Node]:
    """The nodes that a node waits for. Collectives do not wait for each other: their order may be another one, as long as it
    is the same on all ranks, and an exchange need not stay behind a sum of gradients that all pieces add to."""
    found = [graph.producers.get(v) for v in node.inputs]
    earlier = [graph.producers.get(v) for v in node.after]
    found += [n for n in earlier if n is not None and not n.op.effect == node.op.effect == "collective"]
    return [n for n in found if n is not None]


def _place(node: Node) -> str:
    return f"{node.loc.short}: " if node.loc.short else ""


__all__ = ["EXCHANGE", "Along", "Cut", "Cutting", "Layer", "Mode", "Whole", "between", "cutting", "layers", "makers"]
