"""Letter d: packing loses nothing, rounding stays within its bounds, moved factors keep what generated models compute."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from plait.compiler.debugging.interpret import interpret
from plait.compiler.export import capture_model
from plait.compiler.quantize import awq_format, compressed_format
from plait.compiler.quantize.checkpoints import Checkpoint, QuantizedWeight
from plait.formats import SCALES, Quantized, QuantizedType, quantize
from plait.formats.quantized import fits_panels
from plait.passes.quantize.groups import groups
from plait.passes.quantize.linears import linears
from plait.passes.quantize.routes import Edit, Route, input_route
from torch import Tensor, nn
from torch.nn import functional as F

from ..runner import Outcome, Run

TYPES, MODELS = 1000, 200
FOLDED = 1e-9
"""Relative difference in float64 that moving factors may make."""


def measure(run: Run) -> Outcome:
    """1,000 random types and 200 generated models; a quick run takes a tenth."""
    share = 10 if run.quick else 1
    run.say("types")
    packed = [packing(seed) for seed in range(TYPES // share)]
    run.say("models")
    folds = [fold(seed) for seed in range(MODELS // share)]
    lossy = [p["type"] for p in packed if not p["identical"]]
    beyond = [p["type"] for p in packed if p["share of the bound"] > 1]
    moved = [f for f in folds if f["groups moved"]]
    wrong = [f["seed"] for f in folds if f["apart"] > FOLDED]
    figure = {
        "types": len(packed),
        "packed with a loss": len(lossy),
        "largest rounding error, of its bound": f"{max(p['share of the bound'] for p in packed):.4f}",
        "models": len(folds),
        "groups moved": sum(f["groups moved"] for f in folds),
        "groups refused": sum(f["groups refused"] for f in folds),
        "wrong": len(wrong),
        "furthest in float64": f"{max(f['apart'] for f in folds):.1e}",
    }
    worst = dict.fromkeys(sorted({p["format"] for p in packed}), 0.0)
    for p in packed:
        worst[p["format"]] = max(worst[p["format"]], round(p["share of the bound"], 4))
    counts = Counter(layout for p in packed for layout in p["layouts"])
    detail = {
        "layouts": dict(counts), "error by format, of its bound": worst, "lossy": lossy, "beyond": beyond,
        "wrong models": wrong,
    }  # fmt: skip
    return Outcome(figure, not (lossy or beyond or wrong) and bool(moved), detail)


# -- packing ------------------------------------------------------------------------------------------------------------


def random_type(rng: random.Random) -> QuantizedType:
    """Any type, of small sizes."""
    layout = rng.choice(("panels", "rows", "bytes"))
    bits, symmetric = (8, True) if layout == "bytes" else (rng.randint(2, 8), rng.random() < 0.5)
    group = 32 * rng.randint(1, 5) if layout == "panels" else rng.choice((1, 3, 8, 16, 24, 32, 40, 96))
    lead = (rng.randint(1, 3),) if rng.random() < 0.2 else ()
    return QuantizedType(
        (*lead, rng.randint(1, 100), group * rng.randint(1, 6)), bits, group, symmetric, rng.choice(list(SCALES)), layout
    )


def packing(seed: int) -> dict[str, Any]:
    """Whether codes come back from every layout that a random type can have, and how far rounding went."""
    rng, kind = random.Random(seed), random_type(random.Random(seed))
    draw = torch.Generator().manual_seed(seed)
    size = (*kind.shape[:-1], kind.groups)
    codes = torch.randint(0, kind.levels + 1, kind.shape, generator=draw)
    if kind.layout == "bytes":
        codes = codes.clamp(min=1)  # symmetric bytes go from -127
    scales = torch.exp2(torch.randint(-10, 4, size, generator=draw).float())  # every dtype of scales holds these
    zeros = None if kind.symmetric else torch.randint(0, kind.levels + 1, size, generator=draw)
    want = codes, scales, torch.full(size, kind.middle) if zeros is None else zeros
    packed = kind.pack(codes, scales, zeros)
    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {kind.layout: lambda: kind.unpack(*packed[1:])}
    for layout in ("rows", "panels"):
        if layout != kind.layout and (layout == "rows" or fits_panels(kind.columns, kind.group)):
            found[layout] = lambda layout=layout: _plain(packed.to_layout(layout))
    found |= {name: (lambda write=write: _plain(write(packed))) for name, write in _checkpoints(kind).items()}
    identical = QuantizedType.of(str(kind)) == kind
    for get in found.values():
        identical = identical and all(torch.equal(a.double(), b.double()) for a, b in zip(get(), want, strict=True))
    weight = _weight(rng, kind, draw)
    return {
        "type": str(kind),
        "format": f"{'i' if kind.symmetric else 'u'}{kind.bits}/{kind.scale}",
        "layouts": list(found),
        "identical": identical,
        "share of the bound": _of_bound(weight, quantize(weight, kind)),
    }


def _plain(q: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    return q.type.unpack(q.codes, q.scales, q.zeros)


def _checkpoints(kind: QuantizedType) -> dict[str, Callable[[Quantized], Quantized]]:
    """Formats of checkpoints that hold a type: writing and reading again."""
    found: dict[str, Callable[[Quantized], Quantized]] = {}
    if len(kind.shape) == 2 and kind.layout != "bytes":
        if kind.bits == 4 and kind.scale == "f16" and kind.rows % 8 == 0:
            found["AutoAWQ"] = lambda q: _through(awq_format, q)
        if kind.bits in (4, 8) and kind.scale != "e8m0":
            found["compressed-tensors"] = lambda q: _through(compressed_format, q)
    return found


def _through(form: Any, q: Quantized) -> Quantized:
    with tempfile.TemporaryDirectory(prefix="plait-checkpoint-") as folder:
        form.write(folder, Checkpoint({"layer": QuantizedWeight(q)}, {}))
        return form.read(folder).quantized["layer"].parts


def _weight(rng: random.Random, kind: QuantizedType, draw: torch.Generator) -> Tensor:
    """Of any size, with large elements here and there and a group of zeros."""
    weight = torch.randn(kind.shape, generator=draw) * 10.0 ** rng.uniform(-3, 3)
    weight[torch.rand(kind.shape, generator=draw) < 0.01] *= 30
    weight.unflatten(-1, (kind.groups, kind.group))[..., 0, 0, :] = 0
    if rng.random() < 0.2:
        weight = weight.abs()
    return weight


def _of_bound(weight: Tensor, q: Quantized) -> float:
    """The largest error by its bound: half a step, and what the ends of the range lose where the stored scale is smaller
    than the one that was meant, by half a unit in its last place."""
    lost = {"f16": 2**-11, "bf16": 2**-8, "f32": 2**-24, "e8m0": 0.0}[q.type.scale]
    _, scales, _ = _plain(q)
    bound = (scales.double() * (0.5 + q.type.levels * lost)).repeat_interleave(q.type.group, -1)
    error = (weight.double() - q.dequantize(torch.float64)).abs()
    slack = 1e-6 * weight.double().abs()  # codes are chosen in float32
    return float(((error - slack) / bound).max())


# -- moving factors -----------------------------------------------------------------------------------------------------


class GemmaNorm(nn.Module):
    """RMS norm by 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Mixer(nn.Module):
    """Grouped-query attention; with `fused` one layer gives queries, keys and values."""

    def __init__(self, width: int, heads: int, shared: int, *, fused: bool, bias: bool) -> None:
        super().__init__()
        self.size, self.sizes = width // heads, (width, width // shared, width // shared)
        self.fused = nn.Linear(width, sum(self.sizes), bias=bias) if fused else None
        self.parts = None if fused else nn.ModuleList(nn.Linear(width, n, bias=bias) for n in self.sizes)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = [p(x) for p in self.parts] if self.parts is not None else self.fused(x).split(self.sizes, -1)  # type: ignore[misc]
        q, k, v = (p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    """Two layers with an activation between, or a gated product."""

    def __init__(self, width: int, inner: int, kind: str, *, bias: bool) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)
        self.gate = nn.Linear(width, inner, bias=bias) if kind == "gated" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down({"relu": F.relu, "gelu": F.gelu, "plain": lambda y: y}[self.kind](self.up(x)))


class Block(nn.Module):
    """Norms, a mixer or none, and a feed-forward part, with residuals or without."""

    def __init__(self, rng: random.Random, width: int) -> None:
        super().__init__()

        def norm() -> nn.Module:
            kind = rng.choice(("layer", "plain layer", "rms", "gemma", "none"))
            if kind in ("layer", "plain layer"):
                return nn.LayerNorm(width, elementwise_affine=kind == "layer")
            return {"rms": nn.RMSNorm, "gemma": GemmaNorm}[kind](width) if kind != "none" else nn.Identity()

        bias, self.residual = rng.random() < 0.5, rng.random() < 0.7
        heads = rng.choice((2, 4))
        mixer = Mixer(width, heads, rng.choice((1, 2)), fused=rng.random() < 0.4, bias=bias)
        self.first, self.mixer = norm(), mixer if rng.random() < 0.7 else None
        self.second = norm()
        self.feed = Feed(width, width * rng.randint(1, 3), rng.choice(("gated", "relu", "gelu", "plain")), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixer is not None:
            mixed = self.mixer(self.first(x))
            x = x + mixed if self.residual else mixed
        fed = self.feed(self.second(x))
        return x + fed if self.residual else fed


def generated(seed: int) -> tuple[nn.Module, Tensor]:
    """(a model in float64, an input)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = rng.choice((8, 16, 24))
    model = nn.Sequential(*(Block(rng, width) for _ in range(rng.randint(1, 3))), nn.Linear(width, 5)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # no norm has weights of one
    return model, torch.randn(rng.randint(1, 2), rng.randint(2, 6), width, dtype=torch.float64)


def fold(seed: int) -> dict[str, Any]:
    """Random factors for every group of a generated model that has a route, all at once."""
    model, x = generated(seed)
    graph = capture_model(model, (x,), None).graph
    found = linears(graph)
    changed = dict(graph.constants)
    moved = refused = 0
    for group in groups(graph, found, found):
        route = input_route(graph, group, frozenset(found))
        if not isinstance(route, Route):
            refused += 1
            continue
        moved += 1
        factors = route.tied(torch.exp(torch.rand(int(group.x.tensor.shape[-1]), dtype=torch.float64) * 4 - 2))
        labels = torch.arange(len(factors))
        columns = [Edit(str(one.constant), labels[:, None] if one.turned else labels) for one in group.linears]
        _apply(changed, [e.inverse() for e in route.edits], factors)
        _apply(changed, columns, factors)
    wanted, got = interpret(graph, [x])[0], interpret(graph.replace(constants=changed), [x])[0]
    return {
        "seed": seed,
        "groups moved": moved,
        "groups refused": refused,
        "apart": float((got - wanted).abs().max() / wanted.abs().max()),
    }


def _apply(constants: dict[str, Tensor], edits: Sequence[Edit], factors: Tensor) -> None:
    for edit in edits:
        constants[edit.constant] = edit.apply(constants[edit.constant], factors)
