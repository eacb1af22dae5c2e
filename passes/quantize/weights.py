"""The passes that quantize weights: `rtn` (round to nearest), `awq` (activation-aware scales and clipping), `w8a8`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ...errors import BadPassOption, BadScheme
from ...ir import Graph, Reason, RuleLog
from ..base import CapturePoint, Context, Numerics, Pass, approximate, option, register
from .experts import Stack, left, split_experts, stacks
from .linears import Linear, chosen, linears, matches
from .quantization import quantized
from .scheme import Format
from .search import Method

WANT = ("faster", "smaller", "any")


@dataclass(frozen=True)
class Weights(Pass):
    """Base of the passes: which layers, what for, and formats of single layers."""

    at: ClassVar[CapturePoint] = "forward"

    targets: tuple[str, ...] = option(("Linear",), doc="layers: Linear for all, names or their last parts, re:EXPRESSION")
    ignore: tuple[str, ...] = option((), doc="layers to leave as they are, written like targets")
    want: str = option("faster", doc="faster or smaller: leave a layer that would not become so; any: take all")
    layers: tuple[str, ...] = option(
        (), doc="formats of single layers, name=w8g64; a whole name holds, then the first that matches"
    )

    def numerics(self) -> Numerics:
        """What rounding costs depends on the model: the error budget measures it."""
        return approximate(math.inf)

    def format(self) -> Format:
        """The format of layers that have none of their own."""
        raise NotImplementedError

    def method(self) -> Method:
        """What is searched."""
        raise NotImplementedError

    def run(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with quantized layers. Raises NoLayerMatches, BadCalibration, BadPassOption."""
        before, graph = graph, self.split(graph, ctx)
        for node, name, weight, why in left(graph, ctx.parameters):
            ctx.log.refuse("stack", node, Reason(f"{name}: {why}", weight))
        found = linears(graph, ctx.parameters)
        formats = self.formats(graph, found, ctx)
        if not formats:
            return before
        done = quantized(graph, ctx.calibration, formats, found, self.method(), ctx.progress, ctx.known, ctx.keep)
        for layer in done.layers:
            ctx.log.fire(str(layer.format))
        ctx.report(done)
        return done.graph

    def split(self, graph: Graph, ctx: Context) -> Graph:
        """The graph with stacks of matrices taken apart into layers, where any of these will be quantized."""
        meant = {stack.node: stack for stack in stacks(graph) if self.means_some(stack)}
        made = split_experts(graph, self.means_some)
        if made is graph:
            return graph
        trial = replace(ctx, log=RuleLog(), allow=lambda *_: True)
        names = {one.name for one in self.formats(made, linears(made, ctx.parameters), trial)}
        whole = {node: stack for node, stack in meant.items() if not any(name in names for name in stack.experts)}
        for node, stack in whole.items():
            why = next((str(reason) for _, _, reason in trial.log.refused if f"{stack.name}." in str(reason)), "")
            ctx.log.refuse("stack", node, Reason(f"{stack.name}: {why.partition(': ')[2]}", stack.weight))
        return split_experts(graph, lambda stack: stack.node in meant.keys() - whole.keys()) if whole else made

    def means_some(self, stack: Stack) -> bool:
        """Whether any matrix of a stack is to be quantized."""
        return any(map(self.means, stack.experts))

    def means(self, name: str) -> bool:
        """Whether a layer of that name is to be quantized."""
        return matches(name, self.targets) and not matches(name, self.ignore)

    def formats(self, graph: Graph, found: list[Linear], ctx: Context) -> dict[Linear, Format]:
        """The format of each layer that is to be quantized; the others are refused in the log, with the reason."""
        if self.want not in WANT:
            raise BadPassOption(name=self.name, option="want", expected=" or ".join(WANT), value=self.want)
        own = [_own(self.name, text) for text in self.layers]
        wanted: dict[Linear, Format] = {}
        whole = [name for stack in stacks(graph) for name in stack.experts]
        for one in chosen(found, self.targets, self.ignore, whole):
            exact = (form for pattern, form in own if pattern == one.name)
            form = next(exact, None) or next((form for pattern, form in own if matches(one.name, (pattern,))), self.format())
            why = "it stays float as planned" if form.float else self.why_not(graph, one, form, found, ctx)
            if why:
                ctx.log.refuse(str(form), one.node, Reason(f"{one.name}: {why}", one.weight))
            elif ctx.allowed(str(form), one.node):
                wanted[one] = form
        return wanted

    def why_not(self, graph: Graph, one: Linear, form: Format, found: list[Linear], ctx: Context) -> str:
        """Why a layer is left as it is, "" where it is not."""
        kind = form.type_for(one.rows, one.columns)
        if self.want == "any":
            return ""
        if one.constant is None and not ctx.freezes:
            return "its weight is an input: rounding it at each call makes nothing smaller or faster (freeze, or want=any)"
        size = one.rows * one.columns * one.weight.tensor.dtype.itemsize
        if kind.nbytes >= size:
            return f"{kind} takes {kind.nbytes} bytes, the weight {size}"
        readers = {linear.node for linear in found if linear.weight is one.weight}
        if not one.turned and any(user not in readers for user in graph.users.get(one.weight, ())):
            return "its weight is read elsewhere too, and would be held twice"
        if self.want == "smaller":
            return ""
        return ctx.slower(one.x.tensor, kind, form.dynamic)


def _own(name: str, text: str) -> tuple[str, Format]:
    pattern, equals, form = text.rpartition("=")
    try:
        if equals:
            return pattern, Format.of(form)
    except BadScheme as error:
        raise BadPassOption(name=name, option="layers", expected="NAME=FORMAT such as lm_head=w8g64", value=text) from error
    raise BadPassOption(name=name, option="layers", expected="NAME=FORMAT such as lm_head=w8g64", value=text)


@dataclass(frozen=True)
class _Bits(Weights):
    bits: int = option(4, doc="bits of a code, 2 to 8")
    group: int = option(
        128, doc="columns that share a scale, 0 for a whole row; where it does not divide, the next that does"
    )
    symmetric: bool = option(False, doc="no zero points")
    compensate: bool = option(False, doc="rounding that makes up for its errors (GPTQ)")

    def format(self) -> Format:
        if not 2 <= self.bits <= 8:
            raise BadPassOption(name=self.name, option="bits", expected="2 to 8", value=self.bits)
        if self.group < 0:
            raise BadPassOption(name=self.name, option="group", expected="a number from 0 on", value=self.group)
        return Format(self.bits, self.group, self.symmetric)


@register
@dataclass(frozen=True)
class Rtn(_Bits):
    """Hold weights of linear layers as codes of a few bits, rounded to nearest.

    before:  y = linear(x, w, b)
    after:   y = quantized_linear(x, codes, scales, zeros, b, "u4g128[N,K]")
    """

    name: ClassVar[str] = "rtn"

    def method(self) -> Method:
        return Method(compensate=self.compensate)


@register
@dataclass(frozen=True)
class Awq(_Bits):
    """Hold weights as codes after moving scales from inputs into weights, where activations say that it costs least.

    Layers that read one value are scaled together; the inverse scales move into the norm, multiplication or layer that makes
    it, or are multiplied at run time. Judged on calibration data where the layers meet again; never worse there than `rtn`.

    before:  x = layer_norm(h, g, a); y = linear(x, w, b)
    after:   x = layer_norm(h, g/s, a/s); y = quantized_linear(x, codes of w*s, scales, zeros, b, "u4g128[N,K]")
    """

    name: ClassVar[str] = "awq"
    constants_only: bool = option(False, doc="scale only inputs whose factors constants take, as checkpoints of others hold")

    def method(self) -> Method:
        return Method(scale=True, clip=True, compensate=self.compensate, anywhere=not self.constants_only)


@register
@dataclass(frozen=True)
class W8a8(Weights):
    """Multiply bytes: weights are int8, a scale for each row, and activations are rounded to int8 at each call, a scale for
    each token. The rounding fuses into what makes the activation, the scales into the product.

    before:  x = layer_norm(h, g, a); y = linear(x, w, b)
    after:   x = layer_norm(h, g, a); y = dynamic_linear(x, codes, scales, b)
    """

    name: ClassVar[str] = "w8a8"
    compensate: bool = option(False, doc="rounding that makes up for its errors (GPTQ)")

    def format(self) -> Format:
        return Format.of("w8a8")

    def method(self) -> Method:
        return Method(compensate=self.compensate)
