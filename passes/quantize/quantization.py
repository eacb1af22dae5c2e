"""Quantizing the linear layers of a graph: from a plan of formats to a graph that reads codes, with what it cost.

The graph is walked once on the calibration batches; a group is searched when the walk reaches its join. Factors move into
constants along the routes that were proved (`routes.py`); where there is no route the input of a layer is multiplied, which
its producer's kernel does on the side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ...formats import Quantized, QuantizedType
from ...formats.quantized import type_for
from ...ir import Builder, Graph, Node, Reason, Value, prune
from ...ir.quantized_rules import DYNAMIC, LINEAR
from .groups import Group, groups
from .linears import Linear
from .observe import Batch, Batches, Interpreter, check_batches, walk
from .routes import Edit, Route, input_route
from .scheme import Format
from .search import FEW_ROWS, Found, GroupSearch, Method

Progress = Callable[[int, int, str], None]
"""Told how many groups of how many are done, and which layer was last."""


@dataclass(frozen=True)
class Layer:
    """What became of one layer. `nearest_loss` and `loss` are mean squared errors where the layer's group is judged
    (`judged`), relative to what is there, of rounding to nearest and of the result; `route` says how its input is scaled:
    "" (not), "constants", or "at run time" with the reason."""

    name: str
    format: Format
    type: QuantizedType
    nearest_loss: float
    loss: float
    judged: str
    route: str
    clipped: bool
    compensated: bool
    rows_seen: int
    float_bytes: int
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight."""
        return self.type.nbytes

    @property
    def how(self) -> str:
        """What was done besides rounding to nearest."""
        scaled = "scaled" if self.route == "constants" else "scaled at run time" if self.route else ""
        return ", ".join(filter(None, (scaled, "clipped" * self.clipped, "compensated" * self.compensated)))


@dataclass(frozen=True)
class Quantization:
    """A quantized graph, its layers, what each holds by its name, the float constants that changed, and the factors that
    inputs of layers are multiplied by at run time."""

    graph: Graph
    layers: tuple[Layer, ...]
    held: Mapping[str, Quantized] = field(default_factory=dict[str, Quantized])
    changed: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    inputs: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def quantized(
    graph: Graph,
    batches: Batches,
    formats: Mapping[Linear, Format],
    found: Sequence[Linear],
    method: Method,
    progress: Progress = lambda *_: None,
    known: Mapping[tuple[str, ...], Found] = MappingProxyType({}),
    keep: Callable[[tuple[str, ...], Found], None] = lambda *_: None,
) -> Quantization:
    """The graph with the layers of `formats` quantized; `found` are all its linear layers.

    Without a method rounding needs no batches. `known` are searches that an interrupted run has finished, by the names of
    a group's layers, and `keep` is handed each one that is new. Raises BadCalibration.
    """
    wanted = [one for one in found if one in formats and not formats[one].float]
    if not wanted:
        return Quantization(graph, ())
    everything = groups(graph, found, wanted)
    check_batches(graph, batches)
    routes = {group: _route(graph, group, wanted) for group in everything}
    results: dict[Group, Found] = {}
    seen: dict[Linear, int] = {}
    interpreter = Interpreter(graph)

    def visit(group: Group) -> Callable[[Node, Sequence[Batch]], None]:
        def search(_: Node, values: Sequence[Batch]) -> None:
            kinds = {one: formats[one].type_for(one.rows, one.columns) for one in group.linears if one in formats}
            kinds = {one: kind for one, kind in kinds.items() if not formats[one].float}
            dynamic = frozenset(one for one in kinds if formats[one].dynamic)
            route = routes[group]
            names = tuple(dict.fromkeys(one.name for one in kinds))
            made = known.get(names)
            if made is None or any(_without_scale(made.held[one.name].type) != _without_scale(kinds[one]) for one in kinds):
                hunt = GroupSearch(group, kinds, dynamic, values, interpreter, route if isinstance(route, Route) else None)
                alone = all(_readers(one, found) == 1 for one in kinds)
                here = method if alone else Method()  # a weight of several layers is rounded once, for all
                fits = isinstance(route, Route) or here.anywhere
                made = hunt.run(here if fits else replace(here, scale=False))
                keep(names, made)
            results[group] = made
            seen.update((one, sum(b.values[one.x].numel() // one.columns for b in values)) for one in kinds)
            progress(len(results), len(everything), names[-1])

        return search

    walk(graph, batches, ((group.end, visit(group)) for group in everything), kept_until(everything))
    return _emit(graph, formats, everything, routes, results, seen)


def _route(graph: Graph, group: Group, wanted: Sequence[Linear]) -> Route | Reason:
    if any(one.constant is None for one in group.linears):
        return Reason("the weights come in at each call")
    return input_route(graph, group, frozenset(wanted))


def _without_scale(kind: QuantizedType) -> QuantizedType:
    """A type as it was asked for: what its scales are held as depends on the weight."""
    return replace(kind, scale="f16")


def _readers(one: Linear, found: Sequence[Linear]) -> int:
    """How many linear layers have a layer's weight."""
    return sum(other.weight is one.weight for other in found)


def kept_until(everything: Sequence[Group]) -> dict[Value, Node]:
    """Values that must be there when a group is searched, with the node of the last such group."""
    found: dict[Value, Node] = {}
    for group in everything:
        read = {one.x for one in group.linears}  # a layer may read what another of its group leads to, as experts do
        inside = {v for node in group.nodes for v in node.outputs} - {*group.results, *read}
        for v in (
            group.x,
            *group.results,
            *(v for node in group.nodes for v in node.inputs),
            *(one.weight for one in group.linears),
            *read,
        ):
            if v not in inside:
                found[v] = group.end
    return found


def _emit(
    graph: Graph,
    formats: Mapping[Linear, Format],
    everything: Sequence[Group],
    routes: Mapping[Group, Route | Reason],
    results: Mapping[Group, Found],
    seen: Mapping[Linear, int],
) -> Quantization:
    changed: dict[str, Tensor] = {}
    factors: dict[str, Tensor] = {}  # of rows of weights that are held as codes
    inputs: dict[str, Tensor] = {}
    held = {one: results[group].held[one.name] for group in everything for one in _of(group, results[group])}
    coded = {one.constant: one for one in held if one.constant is not None}
    for group in everything:
        scales, route = results[group].scales, routes[group]
        if scales is None:
            continue
        if isinstance(route, Reason):
            inputs.update((name, 1 / scales) for name in results[group].held)
            continue
        for edit in (*(e.inverse() for e in route.edits), *_columns(group, results[group])):
            if edit.constant in coded:
                known = torch.cat([edit.of(scales), torch.ones(1)])
                rows = factors.setdefault(edit.constant, torch.ones(coded[edit.constant].rows))
                factors[edit.constant] = rows * known[edit.labels].reshape(-1)
            else:
                before = changed.get(edit.constant, graph.constants[edit.constant])
                changed[edit.constant] = edit.apply(before, scales)
    done = {one: _with_rows(q, factors[one.constant]) if one.constant in factors else q for one, q in held.items()}
    layers = tuple(
        _layer(one, formats[one], done[one], group, routes[group], results[group], seen.get(one, 0))
        for group in everything
        for one in _of(group, results[group])
    )
    made = _rewritten(graph, formats, done, changed, inputs)
    return Quantization(made, layers, {one.name: q for one, q in done.items()}, changed, inputs)


def _of(group: Group, found: Found) -> list[Linear]:
    """The layers of a group that are quantized."""
    return [one for one in group.linears if one.name in found.held]


def _columns(group: Group, found: Found) -> list[Edit]:
    """Layers of a group that stay float: their columns take what their input loses."""
    rest = (one for one in group.linears if one.name not in found.held)
    labels = torch.arange(int(group.x.tensor.shape[-1]))  # type: ignore[arg-type]
    return [Edit(one.constant, labels[:, None] if one.turned else labels) for one in rest if one.constant is not None]


def _with_rows(q: Quantized, factor: Tensor) -> Quantized:
    """A quantized weight whose rows are multiplied: its scales are."""
    codes, scales, zeros = q.type.unpack(q.codes, q.scales, q.zeros)
    scales = scales * factor[:, None]
    return type_for(scales, q.type).pack(codes, scales, None if q.type.symmetric else zeros)


def _layer(one: Linear, form: Format, q: Quantized, group: Group, route: Route | Reason, found: Found, seen: int) -> Layer:
    how = "" if found.scales is None else "constants" if isinstance(route, Route) else f"at run time: {route.why}"
    judged = "its result" if group.join is one.node.out else _place(group)
    asked = form.group or one.columns
    note = f"calibration brought fewer than {FEW_ROWS} rows: rounded to nearest" if one.name in found.unseen else ""
    if not note and q.type.group != asked and not form.dynamic:
        note = f"groups of {q.type.group}: {asked} do not divide {one.columns}"
    size = one.rows * one.columns * one.weight.tensor.dtype.itemsize
    return Layer(
        one.name, form, q.type, found.nearest_loss, found.loss, judged, how, one.name in found.clipped,
        one.name in found.compensated, seen, size, note,
    )  # fmt: skip


def _place(group: Group) -> str:
    """Where a group of several layers is judged."""
    names = ", ".join(one.name.rpartition(".")[2] for one in group.linears)
    return f"the results of {names}" if group.join is None else f"{group.join.hint} behind {names}"


def _rewritten(
    graph: Graph,
    formats: Mapping[Linear, Format],
    held: Mapping[Linear, Quantized],
    changed: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> Graph:
    builder = Builder(graph)
    builder.constants.update(changed)
    by_node = {one.node: one for one in held}
    scaled: dict[tuple[Value, bytes], Value] = {}
    parts: dict[tuple[str, str], tuple[Value | None, ...]] = {}  # by weight and type: a weight of two layers is held once
    for old in graph.nodes:
        node = builder.resolved(old)
        one = by_node.get(old)
        if one is None:
            builder.append(node)
            continue
        builder.loc = old.loc.by("quantize")
        x, bias = builder.resolve(one.x), builder.resolve(one.bias)
        if one.constant is None:
            builder.subst[old.out] = _faked(
                builder, one, x, bias, held[one].type, formats[one].dynamic, inputs.get(one.name)
            )
            continue
        if one.name in inputs:
            key = x, inputs[one.name].numpy().tobytes()
            if key not in scaled:
                factor = builder.constant(inputs[one.name].to(one.x.tensor.dtype), f"{one.name}.input_scale")
                scaled[key] = builder.call("aten.mul.Tensor", x, factor, hint=one.x.hint)
            x = scaled[key]
        what = one.constant, str(held[one].type)
        if what not in parts:
            parts[what] = _constants(builder, held[one], one.name)
        codes, scales, zeros = parts[what]
        if formats[one].dynamic:
            builder.subst[old.out] = builder.call(DYNAMIC, x, codes, scales, bias)
        else:
            builder.subst[old.out] = builder.call(LINEAR, x, codes, scales, zeros, bias, str(held[one].type))
    return prune(builder.finish())


def _faked(
    builder: Builder, one: Linear, x: Value, bias: Value | None, kind: QuantizedType, dynamic: bool, factor: Tensor | None
) -> Value:
    """A layer whose weight comes in at each call, and is rounded there: gradients reach it as if it were not."""
    weight = builder.resolve(one.weight)
    if one.turned:
        weight = builder.call("aten.permute.default", weight, (1, 0))
        weight = builder.call("aten.clone.default", weight, memory_format=torch.contiguous_format)
    if dynamic:
        x = builder.call("plait.fake_quantize_rows.default", x)
    scales = None if factor is None else builder.constant((1 / factor).to(weight.tensor.dtype), f"{one.name}.input_scale")
    if scales is not None:
        weight = builder.call("aten.mul.Tensor", weight, scales)
    weight = builder.call("plait.fake_quantize.default", weight, str(kind))
    if scales is not None:
        weight = builder.call("aten.div.Tensor", weight, scales)
    return builder.call("aten.linear.default", x, weight, bias)


def _constants(builder: Builder, q: Quantized, name: str) -> tuple[Value | None, ...]:
    parts = zip(("codes", "scales", "zeros"), (q.codes, q.scales, q.zeros), strict=True)
    return tuple(None if part is None else builder.constant(part, f"{name}.{what}") for what, part in parts)
