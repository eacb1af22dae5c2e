"""Side-by-side times of eager, Inductor and plait; compile time and the cost of a call beside each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from tests.generate.judge import judge
from tests.models import Scale, build, example, loss

from .harness import Probe, geometric_mean, side_by_side
from .micro import MICROS, Micro
from .models import FULL, LENGTH, TRAINED, doubled, float64, tiny
from .plait_seam import cold_caches, fresh, multiply_add_ceiling
from .runner import Outcome, Run

PEER = "inductor"
RESERVE_S = 20.0  # what a quick run leaves to the letters that follow


@dataclass(frozen=True)
class Variant:
    """How a model is timed: a forward or a training step, on how many samples, in which dtype, and whether parameters are
    frozen, on both sides (Inductor with `freezing` and `max_autotune`)."""

    train: bool = False
    batch: int = 1
    frozen: bool = False
    dtype: torch.dtype = torch.float32

    def title(self, name: str) -> str:
        """A row's name in reports."""
        parts = [name, "training step" if self.train else "forward"]
        parts += [f"of {self.batch}"] if self.batch > 1 else []
        parts += ["frozen"] if self.frozen else []
        parts += [str(self.dtype).removeprefix("torch.")] if self.dtype != torch.float32 else []
        return " ".join(parts)

    def model(self, name: str, scale: Scale) -> nn.Module:
        """The model, ready to be timed."""
        made = build(name, scale).to(self.dtype)
        return made.train() if self.train else made

    def example(self, name: str, scale: Scale, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Its arguments, floats in the variant's dtype."""
        given = example(name, scale, batch, length, labels=self.train)
        return {k: x.to(self.dtype) if x.is_floating_point() else x for k, x in given.items()}


class Contenders:
    """eager, Inductor and the backend under test on one function; remembers what compiling each took."""

    def __init__(self, backend: str, *, frozen: bool = False) -> None:
        self.backends = [PEER] if backend == PEER else [PEER, backend]
        self.frozen = frozen
        self.compile_s: dict[str, float] = {}

    def compiled(self, fn: Any, name: str) -> Any:
        """`fn` under a backend, parameters frozen where that was asked for."""
        if not self.frozen:
            return torch.compile(fn, backend=name, dynamic=False)
        options = {"freezing": True, "max_autotune": True} if name == PEER else {"freeze": True}
        return torch.compile(fn, backend=name, dynamic=False, options=options)

    def make(
        self, call: Callable[[Callable[..., Any]], Callable[[], Any]], fn: Any, *, timed: bool
    ) -> dict[str, Callable[[], Any]]:
        """Name to a call without arguments. `call(f)` binds arguments of its own to eager or compiled `f`.

        Every one has been called once, so that all have left their arguments alike. A `timed` first call runs with empty
        disk caches and goes to `compile_s`: Dynamo, AOTAutograd and the backend.
        """
        made = {"eager": call(fn)}
        made["eager"]()
        for name in self.backends:
            fresh_fn = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
            made[name] = call(self.compiled(fresh_fn, name))
            start = time.perf_counter()
            if timed:
                with cold_caches():
                    made[name]()
                self.compile_s[name] = round(time.perf_counter() - start, 3)
            else:
                made[name]()
        return made


def agree(candidates: dict[str, Callable[[], Any]], exact: Callable[[], Any]) -> dict[str, str]:
    """Verdict of each compiled candidate against eager; refuses results that are all zero, which time nothing."""
    expected = candidates["eager"]()
    leaves = [x for x in tree_leaves(expected) if isinstance(x, torch.Tensor)]
    if not any(x.count_nonzero() for x in leaves):
        raise RuntimeError("the benchmark computes nothing but zeros")
    return {name: judge(call(), expected, exact).kind for name, call in candidates.items() if name != "eager"}


def micro(one: Micro, backend: str, probe: Probe, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Time one micro-benchmark at full size, and at one row for the cost of a call."""
    fresh()
    contenders = Contenders(backend)

    def bound(n: int) -> Callable[[Callable[..., Any]], Callable[[], Any]]:
        def bind(f: Callable[..., Any]) -> Callable[[], Any]:
            given = one.make(n)
            return lambda: f(*given)

        return bind

    def exact() -> Any:
        given = tree_map(doubled, one.make(one.full))
        one.fn(*given)
        return one.fn(*given)

    with torch.no_grad():
        candidates = contenders.make(bound(one.full), one.fn, timed=True)
        verdicts = agree(candidates, exact)
        timings = side_by_side(candidates, rounds=rounds, seconds=seconds, probe=probe)
        fresh()
        small = side_by_side(contenders.make(bound(1), one.fn, timed=False), rounds=rounds, seconds=seconds / 4, probe=probe)
    return _row(verdicts, timings.as_json("eager"), small.as_json("eager"), contenders, timings, backend)


def model(
    name: str, backend: str, probe: Probe, variant: Variant = Variant(), *, rounds: int, seconds: float, calls: bool = True
) -> dict[str, Any]:
    """Time a model's forward, or forward and backward; with `calls` also the same architecture at width 16, for the cost of
    a call. A float32 forward also says which share of the multiply-adds that this machine reaches its products and
    convolutions come to, all of the time counted."""
    fresh()
    contenders = Contenders(backend, frozen=variant.frozen)
    train = variant.train

    def bind(scale: Any, batch: int, length: int) -> Callable[[Callable[..., Any]], Callable[[], Any]]:
        given = variant.example(name, scale, batch, length)

        def bound(f: Any) -> Callable[[], Any]:
            if not train:
                return lambda: f(**given)

            def step() -> Any:
                f.zero_grad(set_to_none=True)
                value = loss(name, f, given)
                value.backward()
                return value.detach(), [p.grad for p in f.parameters()]

            return step

        return bound

    full = variant.model(name, FULL[name])

    def exact() -> Any:
        wide = copy.deepcopy(full).double()
        given = tree_map(doubled, variant.example(name, FULL[name], variant.batch, LENGTH))
        with float64():
            if not train:
                return wide(**given)
            value = loss(name, wide, given)
            value.backward()
            return value.detach(), [p.grad for p in wide.parameters()]

    with torch.set_grad_enabled(train):
        candidates = contenders.make(bind(FULL[name], variant.batch, LENGTH), full, timed=True)
        verdicts = agree(candidates, exact)
        timings = side_by_side(candidates, rounds=rounds, seconds=seconds, probe=probe)
        overhead = None
        if calls:
            fresh()
            batch = 2 if train else 1  # batch norm trains on no single value
            small = contenders.make(bind(tiny(name), batch, 2), variant.model(name, tiny(name)), timed=False)
            overhead = side_by_side(small, rounds=rounds, seconds=seconds / 4, probe=probe).as_json("eager")
    row = _row(verdicts, timings.as_json("eager"), overhead, contenders, timings, backend)
    if not train and variant.dtype is torch.float32:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            candidates["eager"]()
        reached = counted.get_total_flops() / (row["time"]["us"][backend][0] * 1e-6)
        row["share of the ceiling"] = round(reached / multiply_add_ceiling(), 3)
    return row


def _row(verdicts: Any, full: Any, small: Any, contenders: Contenders, timings: Any, backend: str) -> dict[str, Any]:
    over_peer = timings.speedup(backend, PEER) if backend != PEER else None
    return {
        "verdict": verdicts,
        "time": full,
        "smallest call": small,
        "compile_s": contenders.compile_s,
        "speedup_over_inductor": [round(x, 3) for x in (over_peer.median, over_peer.low, over_peer.high)]
        if over_peer
        else None,
        "speedup_over_eager": round(timings.speedup(backend, "eager").median, 3),
        "at least": {peer: round(timings.at_least(backend, peer), 3) for peer in timings.samples if peer != backend},
    }


def measure(run: Run) -> Outcome:
    """Letter d: the models forward, three of them trained, and the micro-benchmarks. A quick run takes two micros."""
    probe, rows = Probe(), {}
    micros = [m for m in MICROS if m.name in ("bias gelu", "layer norm")] if run.quick else MICROS
    budget = {"rounds": 10, "seconds": 2.0} if run.quick else {"rounds": 25, "seconds": 20.0}
    for one in micros:
        if rows and run.left < RESERVE_S:
            break
        run.say(one.name)
        rows[one.name] = micro(one, run.backend, probe, **budget)
    if not run.quick:
        for name, variant in [(n, Variant()) for n in FULL] + [(n, Variant(train=True)) for n in TRAINED]:
            title = variant.title(name)
            run.say(title)
            rows[title] = model(name, run.backend, probe, variant, rounds=20, seconds=30.0)
    names = {m.name for m in MICROS}
    figure: dict[str, Any] = {}
    for peer in ("eager", "inductor"):
        for kind, chosen in (("micros", names), ("models", rows.keys() - names)):
            ratios = [r[f"speedup_over_{peer}"] for n, r in rows.items() if n in chosen and r[f"speedup_over_{peer}"]]
            ratios = [r[0] if isinstance(r, list) else r for r in ratios]
            if ratios:
                figure[f"{kind} over {peer}"] = f"{geometric_mean(ratios):.2f}x"
    wrong = [n for n, r in rows.items() if r["verdict"].get(run.backend) == "wrong"]
    figure["rows"] = len(rows)
    figure["rounds thrown away"] = sum(r["time"]["thrown"] for r in rows.values())
    figure["wrong"] = len(wrong)
    return Outcome(figure, not wrong, rows)
