"""Planted faults: forty ways to compile a program wrong, each at one place of one program, chosen by its seed.

A plant makes one choice of one compilation wrong and says where: which stage, at which node. What finds it (bisection, the
search for the first bad node, reduction) knows nothing of plants.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import torch
from plait.codegen import expand, groups, memory, plan, reductions
from plait.codegen.compile import trace
from plait.codegen.items import KernelItem
from plait.codegen.lowering import POINTWISE, At
from plait.codegen.repeats import Repeats
from plait.compiler import pipelines
from plait.compiler.debugging.bisect import Culprit
from plait.compiler.debugging.cut import cone
from plait.compiler.debugging.first_bad import BadNode
from plait.compiler.debugging.subject import Subject
from plait.compiler.decisions import Decisions
from plait.ir import Builder, Graph, Node, Rule, Value, from_fx
from plait.passes.base import Context, Pass
from plait.passes.decompositions import table
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

# -- programs -----------------------------------------------------------------------------------------------------------

WIDTH, HEADS, TOKENS, BATCH, LAYERS = 32, 4, 8, 2, 12


class Block(nn.Module):
    """One layer of a transformer, attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        at = torch.arange(TOKENS)
        seen = at[:, None] >= at[None, :]
        scores = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).masked_fill(~seen, -1e9)
        mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Twelve layers over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids)))


class Convolutional(nn.Module):
    """Four residual blocks of convolutions with batch norm, a squeeze gate, pooling, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(8))
        self.gates = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 10)
        for norm in self.norms:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(x))
        for i in range(4):
            y = F.relu(self.norms[2 * i](self.convs[2 * i](x)))
            y = self.norms[2 * i + 1](self.convs[2 * i + 1](y))
            gate = torch.sigmoid(self.gates[i](y.mean((2, 3))))
            x = F.relu(x + y * gate[:, :, None, None])
        return self.head(x.mean((2, 3)))


def _loss(model: nn.Module) -> Callable[..., torch.Tensor]:
    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), labels)

    return loss


class Trained(nn.Module):
    """Two wide layers with norms and dropout, for a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 10)
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(F.gelu(self.norm1(self.a(x))), 0.2)
        h = h + torch.tanh(self.norm2(self.b(h)))
        return self.c(F.dropout(F.silu(h), 0.2) * torch.sigmoid(h))


def _varied(model: nn.Module) -> nn.Module:
    """Gains and shifts of norms that are not 1 and 0, where losing one would change nothing."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


@cache
def subject(name: str) -> Subject:
    """A program by name: transformer, convolutional (captured by torch.export) or training (gradients of a loss)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "transformer":
            return Subject.of(_varied(Transformer()).eval(), (torch.randint(0, 50, (BATCH, TOKENS)),))
        if name == "convolutional":
            return Subject.of(_varied(Convolutional()).eval(), (torch.randn(2, 3, 8, 8),))
        model = _varied(Trained()).train()
        parameters = {k: v.detach() for k, v in model.named_parameters()}
        given = (torch.randn(6, 24), torch.randint(0, 10, (6,)))

        def step(*flat: torch.Tensor) -> list[torch.Tensor]:
            named = dict(zip(parameters, flat, strict=False))
            gradients, value = torch.func.grad_and_value(_loss(model))(named, *flat[len(parameters) :])
            return [value, *gradients.values()]

        flat = [*parameters.values(), *given]
        gm = make_fx(torch.func.functionalize(step), decomposition_table=table(), tracing_mode="fake")(*flat)
        return Subject.of(from_fx(gm, "joint"), flat, level="joint")


@cache
def _final(name: str) -> tuple[Graph, Graph, tuple[KernelItem, ...]]:
    """The clean program: its graph after the passes, with composite ops opened, and its kernels."""
    build = subject(name).build(Decisions())
    traced = trace(build.graph)
    return build.graph, traced.scheduled.graph, tuple(i for i in traced.scheduled.items if isinstance(i, KernelItem))


# -- what a plant is ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A fault at work: the subject to search, and what the right answers look like.

    `stages` may be to blame, at a node whose result is called one of `names`, by `rule`. Where nodes are traced anew, and
    get new names, `stack` is the place in the program.
    """

    subject: Subject
    stages: tuple[str, ...]
    names: tuple[str, ...]
    rule: str = ""
    stack: str = ""

    def found_by(self, culprit: Culprit) -> bool:
        """Whether bisection named the right choice."""
        decision = culprit.decision
        if decision is None or decision.stage not in self.stages:
            return False
        if self.rule and decision.rule != self.rule:
            return False
        return not self.names or (decision.node is not None and _hints(decision.node) & set(self.names) != set())

    def is_at(self, bad: BadNode) -> bool:
        """Whether the search for the first bad node ended at the right one."""
        if self.stack:
            return bad.stage == "lower" and bad.node.loc.stack == self.stack
        return bool(_hints(bad.node) & set(self.names)) or bool(self.rule and self.rule in bad.rules)


def _hints(node: Node) -> set[str]:
    return {v.hint for v in node.results}


@dataclass(frozen=True)
class Plant:
    """A fault by name, the program it is planted in, and how: a context manager given a source of chance."""

    name: str
    program: str
    plant: Callable[[str, random.Random], Any]

    @contextmanager
    def planted(self, seed: int) -> Iterator[Planted]:
        """The fault at work, at the place that `seed` chooses."""
        with self.plant(self.program, random.Random(f"{self.name} {seed}")) as made:
            yield made


# -- wrong rewrites -------------------------------------------------------------------------------------------------------

Edit = Callable[[Builder, Node], Any]


@dataclass(frozen=True)
class Miswrite(Pass):
    """Makes every node of some ops anew; one of them, by the name of its result, wrong."""

    name: ClassVar[str] = "miswrite"
    at: ClassVar[Any] = "any"
    ops: tuple[str, ...] = ()
    target: str = ""
    edit: Edit | None = field(default=None, compare=False)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        b = Builder(graph)
        for old in graph.nodes:
            node = b.resolved(old)
            if node.op.name not in self.ops or not ctx.allowed("rebuild", old):
                b.append(node)
                continue
            b.loc = node.loc.by("rebuild")
            wrong = self.target in _hints(old) and self.edit is not None
            made = self.edit(b, node) if wrong and self.edit is not None else b.call(node.op, *node.args)
            for v, new in zip(old.results, made if isinstance(made, tuple) else (made,), strict=True):
                b.subst[v] = ctx.log.replaced[v] = new
        return b.finish()


def rewrite(program: str, *ops: str, edit: Edit, keep: Callable[[Node], bool] = lambda n: True) -> Plant:
    """A pass that rebuilds nodes of `ops`, one of them by `edit`. `keep` says which nodes are fit for the fault."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        clean = subject(name)
        start = clean.transform(Decisions())[1]
        graph = next((s.after for s in start if s.pass_name == "lower"), clean.graph)
        fit = [n for n in graph.nodes if n.op.name in ops and n.token is None and keep(n)]
        chosen = chance.choice(fit).results[0].hint
        made = Miswrite(ops, chosen, edit)
        yield Planted(replace(clean, options=replace(clean.options, passes=(made,))), ("miswrite",), (chosen,), "rebuild")

    return Plant("", program, plant)


@dataclass(frozen=True)
class Hasty(Pass):
    """Makes draws of random numbers wait for their operands only: one of them, by name, then comes before all others."""

    name: ClassVar[str] = "miswrite"
    at: ClassVar[Any] = "any"
    target: str = ""

    def run(self, graph: Graph, ctx: Context) -> Graph:
        draws = [n for n in graph.nodes if n.token is not None and ctx.allowed("rebuild", n)]
        early = cone(graph, [v for n in draws if self.target in _hints(n) for v in n.results])
        b = Builder(graph)
        for node in sorted(graph.nodes, key=lambda n: n not in early):
            b.append(b.resolved(node))
        return b.finish()


def reordering(program: str) -> Plant:
    """A random draw that lost the token which kept it behind an earlier one."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        clean = subject(name)
        chosen = chance.choice([n for n in clean.graph.nodes if n.after]).results[0].hint
        made = Hasty(chosen)
        yield Planted(replace(clean, options=replace(clean.options, passes=(made,))), ("miswrite",), (chosen,), "rebuild")

    return Plant("", program, plant)


def _numbers(fn: Callable[[Any], Any], position: int) -> Edit:
    def edit(b: Builder, n: Node) -> Any:
        args = list(n.args)
        args[position] = fn(args[position])
        return b.call(n.op, *args)

    return edit


def _other_constant(b: Builder, n: Node) -> Any:
    """The operand at the front taken from another constant of the same type: one that was right a layer ago."""
    first = n.args[0]
    others = [
        v for v in b.producers if v is not first and v.type == first.type and b.producers[v].op.name == "plait.constant"
    ]
    return b.call(n.op, others[-1] if others[-1] is not first else others[0], *n.args[1:])


def _rounded(b: Builder, n: Node) -> Any:
    half = b.call("aten._to_copy.default", b.call(n.op, *n.args), dtype=torch.bfloat16)
    return b.call("aten._to_copy.default", half, dtype=torch.float32)


def _elementwise(name: str, *more: Any) -> Edit:
    return lambda b, n: b.call(name, n.args[0], *more)


def _swapped(b: Builder, n: Node) -> Any:
    return b.call(n.op, n.args[1], n.args[0])


def _untransposed(b: Builder, n: Node) -> Any:
    """A square weight as it is, laid out as its transposition would be."""
    turned = b.call("aten.clone.default", b.call("aten.permute.default", *n.args), memory_format=torch.contiguous_format)
    return b.call("aten.permute.default", turned, (1, 0))


def _tensors(n: Node) -> bool:
    return all(isinstance(a, Value) and a.tensor.shape == n.out.tensor.shape for a in n.args[:2])


def _scaled_by(factor: float) -> Edit:
    def edit(b: Builder, n: Node) -> Any:
        made = b.call(n.op, *n.args)
        outs = made if isinstance(made, tuple) else (made,)
        wrong = (b.call("aten.mul.Tensor", outs[0], factor), *outs[1:])
        return wrong if isinstance(made, tuple) else wrong[0]

    return edit


# -- wrong code -----------------------------------------------------------------------------------------------------------


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    is_table = isinstance(owner, dict)
    old = owner[name] if is_table else getattr(owner, name)
    owner.__setitem__(name, value) if is_table else setattr(owner, name, value)
    try:
        yield
    finally:
        owner.__setitem__(name, old) if is_table else setattr(owner, name, old)


def _emitted(self: Repeats, group: Any, nodes: Any, emit: Callable[[], KernelItem]) -> KernelItem:
    """In the place of `Repeats.item`: a fault at one node must not be taken over from, or by, its equals."""
    return emit()


def _named_apart(graph: Graph, op: str) -> list[Node]:
    """The nodes of an op whose results have names that nothing else of it has: a plant knows its place by the name."""
    nodes = [n for n in graph.nodes if n.op.name == op]
    names = Counter(n.results[0].hint for n in nodes)
    return [n for n in nodes if names[n.results[0].hint] == 1] or nodes


def lowering(program: str, op: str, wrong: Callable[[Callable[[At], str], At], str]) -> Plant:
    """One node's elements computed wrong by generated code."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        chosen = chance.choice(_named_apart(_final(name)[1], op)).results[0].hint
        right = POINTWISE[op]

        def planted(at: At) -> str:
            return wrong(right, at) if at.node.results[0].hint == chosen else right(at)

        with _patched(POINTWISE, op, planted), _patched(Repeats, "item", _emitted):
            yield Planted(subject(name), ("generate", "inline", "fuse"), (chosen,))

    return Plant("", program, plant)


def _instead(op: str) -> Callable[[Callable[[At], str], At], str]:
    return lambda right, at: POINTWISE[op](at)


def _off_by(amount: float) -> Callable[[Callable[[At], str], At], str]:
    return lambda right, at: at.op("add", at.body.cast(right(at), at.dtype), at.const(amount))


def _first_element(right: Callable[[At], str], at: At) -> str:
    """Reads the first column everywhere: an index that lost its last part."""
    return right(replace(at, index=(*at.index[:-1], 0)))


def _neighbour(right: Callable[[At], str], at: At) -> str:
    """Reads rows and columns of a square the wrong way round."""
    return right(replace(at, index=(*at.index[:-2], at.index[-1], at.index[-2])))


def reduction(program: str, op: str, wrong: Callable[[Any], Any], keep: Callable[[Node], bool] = lambda n: True) -> Plant:
    """One node reduced wrong."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        fit = [n for n in _named_apart(_final(name)[1], op) if keep(n)]
        chosen = chance.choice(fit).results[0].hint
        right = reductions.REDUCTIONS[op]

        def planted(node: Node) -> Any:
            return wrong(right(node)) if node.results[0].hint == chosen else right(node)

        with _patched(reductions.REDUCTIONS, op, planted), _patched(Repeats, "item", _emitted):
            yield Planted(subject(name), ("generate", "inline", "fuse"), (chosen,))

    return Plant("", program, plant)


def opening(program: str, op: str, wrong: Callable[[Builder, Any], Any]) -> Plant:
    """A composite op opened into the wrong parts at one place."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        fit = [n for n in _final(name)[0].nodes if n.op.name == op]
        chosen = chance.choice(fit).results[0].hint
        rules = expand._GUARDED

        def planted(rule: Rule) -> Rule:
            if op not in rule.pattern.ops:
                return rule

            def build(m: Any, b: Builder) -> Any:
                made = rule.build(m, b)
                return wrong(b, made) if m.node.results[0].hint == chosen else made

            return replace(rule, build=build)

        with _patched(expand, "_GUARDED", tuple(map(planted, rules))):
            yield Planted(subject(name), ("expand",), (chosen,), f"expand-{op.split('.')[1]}")

    return Plant("", program, plant)


def _halved(b: Builder, made: Any) -> Any:
    outs = made if isinstance(made, tuple) else (made,)
    wrong = (b.call("aten.mul.Tensor", outs[0], 0.5), *outs[1:])
    return wrong if isinstance(made, tuple) else wrong[0]


def fusing(program: str) -> Plant:
    """A unit that joins a group of square loops and gets their axes the wrong way round."""

    def turned(fit: Any, group: Any) -> Any:
        if fit is None or fit.outer or len(fit.index) < 2 or len(group.axes) < 2:
            return None
        a, b = group.axes[-2:]
        if a.extent != b.extent or fit.index[-2:] != (a.symbol, b.symbol):
            return None
        return replace(fit, index=(*fit.index[:-2], b.symbol, a.symbol))

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        right = groups.Grouping._fit
        joined: list[str] = []

        def watching(self: Any, unit: Any, group: Any) -> Any:
            fit = right(self, unit, group)
            if unit.reduce is None and turned(fit, group) is not None:
                joined.append(unit.node.results[0].hint)
            return fit

        with _patched(groups.Grouping, "_fit", watching):
            trace(_final(name)[0])
        chosen = chance.choice(sorted(set(joined)))

        def planted(self: Any, unit: Any, group: Any) -> Any:
            fit = right(self, unit, group)
            return turned(fit, group) or fit if unit.node.results[0].hint == chosen else fit

        with _patched(groups.Grouping, "_fit", planted):
            yield Planted(subject(name), ("fuse",), (chosen,))

    return Plant("", program, plant)


def racing(program: str) -> Plant:
    """A value placed in memory that another one still needs."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        right = memory.plan_arena
        seen: list[tuple[str, str]] = []

        def pairs(blocks: Any) -> Iterator[tuple[Any, Any]]:
            """Values of one size, the second made while the first is needed."""
            for i, b in enumerate(blocks):
                yield from ((a, b) for a in blocks[:i] if a.first < b.first < a.last and a.nbytes == b.nbytes)

        def watching(blocks: Any, reuse: Any) -> Any:
            seen.extend((a.key.hint, b.key.hint) for a, b in pairs(blocks))
            return right(blocks, reuse)

        with _patched(plan, "plan_arena", watching):
            trace(_final(name)[0])
        names = chance.choice(seen)

        def planted(blocks: Any, reuse: Any) -> Any:
            arena = right(blocks, reuse)
            for victim, thief in pairs(blocks):
                if (victim.key.hint, thief.key.hint) == names and reuse(thief.key):
                    return replace(arena, offsets={**arena.offsets, thief.key: arena.offsets[victim.key]})
            return arena

        with _patched(plan, "plan_arena", planted):
            yield Planted(subject(name), ("reuse",), names)

    return Plant("", program, plant)


def decomposing(program: str, op: str, wrong: Callable[..., Any]) -> Plant:
    """A decomposition that goes wrong at one of its calls."""

    @contextmanager
    def plant(name: str, chance: random.Random) -> Iterator[Planted]:
        overload = next(o for o in table() if str(o) == op)
        clean = subject(name)
        chosen = chance.choice([n for n in clean.graph.nodes if n.op.name == op])
        right = pipelines.deciding_table

        def planted_table(entries: Any, decisions: Any, where: Any) -> Any:
            def planted(*args: Any, **kwargs: Any) -> Any:
                result, here = made[overload](*args, **kwargs), where()
                hit = result is not NotImplemented and here is not None and _hints(here) == _hints(chosen)
                return wrong(result) if hit else result

            made = right(entries, decisions, where)
            return {**made, overload: planted}

        with _patched(pipelines, "deciding_table", planted_table):
            yield Planted(clean, ("decompose",), tuple(_hints(chosen)), op, chosen.loc.stack)

    return Plant("", program, plant)


# -- the forty --------------------------------------------------------------------------------------------------------------

T, C, S = "transformer", "convolutional", "training"
_WEIGHTED = "aten.native_layer_norm.default"

PLANTS: tuple[Plant, ...] = tuple(
    replace(plant, name=name)
    for name, plant in {
        # wrong rewrites: values, operands, arguments, masks, dtypes, constants, broadcasts, indices, order of effects
        "scale of attention": rewrite(T, "aten.mul.Tensor", edit=_numbers(lambda x: 1.1 * x, 1),
                                      keep=lambda n: isinstance(n.args[1], float)),
        "lost residual": rewrite(T, "aten.add.Tensor", edit=lambda b, n: b.call("aten.clone.default", n.args[1]),
                                 keep=_tensors),
        "wrong axis of softmax": rewrite(T, "aten._softmax.default", edit=_numbers(lambda d: d - 1, 1)),
        "wrong epsilon": rewrite(T, _WEIGHTED, edit=_numbers(lambda e: e + 0.1, 4)),
        "mask off by one": rewrite(T, "aten.ge.Tensor", edit=lambda b, n: b.call("aten.gt.Tensor", *n.args)),
        "dtype slip": rewrite(T, "aten.gelu.default", "aten._softmax.default", edit=_rounded),
        "stale bias": rewrite(T, "aten.addmm.default", edit=_other_constant),
        "lost transposition": rewrite(T, "aten.permute.default", edit=_untransposed, keep=lambda n: n.args[1] == (1, 0) and (
            n.out.tensor.shape == (WIDTH, WIDTH))),
        "approximate gelu": rewrite(T, "aten.gelu.default", edit=lambda b, n: b.call(n.op, n.args[0], "tanh")),
        "lost gain of a norm": rewrite(T, _WEIGHTED, edit=lambda b, n: b.call(n.op, *n.args[:2], None, *n.args[3:])),
        "swapped operands": rewrite(C, "aten.sub.Tensor", "aten.add.Tensor", edit=lambda b, n: b.call(
            "aten.sub.Tensor", n.args[1], n.args[0]), keep=_tensors),
        "relu of nothing": rewrite(C, "aten.relu.default", edit=_elementwise("aten.clone.default", None)),
        "mean over one axis": rewrite(C, "aten.mean.dim", edit=_scaled_by(8.0)),
        "wrong padding": rewrite(C, "aten.convolution.default", edit=lambda b, n: b.call(
            n.op, *n.args[:3], (1, 1), (2, 2), (2, 2), *n.args[6:]), keep=lambda n: n.args[0].tensor.shape[1] == 8),
        "stale statistics": rewrite(C, "aten.sub.Tensor", edit=lambda b, n: b.call(
            n.op, n.args[0], b.call("aten.mul.Tensor", n.args[1], 0.5))),
        "wrong broadcast": rewrite(C, "aten.sigmoid.default", edit=lambda b, n: b.call(
            n.op, b.call("aten.flip.default", n.args[0], (1,)))),
        "dropped token": reordering(S),
        # wrong gradient formulas
        "gradient of an activation": rewrite(S, "aten.sub.Tensor", edit=lambda b, n: b.call(
            "aten.mul.Tensor", b.call(n.op, *n.args), 0.9)),
        "gradient of gelu": rewrite(S, "aten.erf.default", edit=_elementwise("aten.tanh.default")),
        "gradient of a norm": rewrite(S, "aten.mul.Tensor", edit=_scaled_by(1.02), keep=_tensors),
        "gradient of a product": rewrite(S, "aten.mm.default", edit=_scaled_by(-1.0)),
        "gradient of a loss": rewrite(S, "aten.neg.default", edit=_elementwise("aten.clone.default", None)),
        "gradient of a sum": rewrite(S, "aten.sum.dim_IntList", edit=_scaled_by(1 / 3)),
        # wrong code for one node
        "kernel of gelu": lowering(T, "aten.gelu.default", _instead("aten.silu.default")),
        "kernel of exp": lowering(T, "aten.exp.default", _off_by(0.01)),
        "kernel of rsqrt": lowering(T, "aten.rsqrt.default", _instead("aten.sqrt.default")),
        "index without its last part": lowering(T, "aten.gelu.default", _first_element),
        "rows for columns": lowering(T, "aten.where.self", _neighbour),
        "kernel of relu": lowering(C, "aten.relu.default", _instead("aten.sigmoid.default")),
        "kernel of sigmoid": lowering(C, "aten.sigmoid.default", _off_by(1e-3)),
        "kernel of a backward": lowering(S, "aten.sub.Tensor", _instead("aten.add.Tensor")),
        "sum of squares": reduction(T, "aten.sum.dim_IntList", lambda spec: replace(spec, map=lambda at: at.op(
            "mul", spec.map(at), at.const(1.5)))),
        "largest for sum": reduction(C, "aten.sum.dim_IntList", lambda spec: replace(spec, op="max")),
        "sum of a backward": reduction(S, "aten.sum.dim_IntList", lambda spec: replace(spec, op="max"),
                                       keep=lambda n: n.args[0].tensor.numel > n.out.tensor.numel),
        # composite ops opened wrong
        "opened softmax": opening(T, "aten._softmax.default", _halved),
        "opened norm": opening(T, _WEIGHTED, _halved),
        # fusion, memory, decompositions
        "fused too early": fusing(T),
        "race of two values": racing(T),
        "race in a step": racing(S),
        "decomposed mask": decomposing(T, "aten.masked_fill.Scalar", lambda x: x * 1.5),
    }.items()
)  # fmt: skip
