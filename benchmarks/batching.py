"""Letters of the suite `autobatch`: batched programs beside DyNet and beside their instances one by one."""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plait
import torch
from plait.codegen.cache import Cache
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.target import retarget
from plait.codegen.triton.build import binaries
from plait.codegen.triton.interpret import Interpreter
from plait.compiler.autobatch.switches import SWITCHES
from plait.runtime.plan import Call, Launch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.codegen.cuda_plan import run_interpreted
from tests.compiler import batched_models, control_flow
from tests.compiler.batched_models import CASES, WORDS, Tree
from tests.helpers import copies, random_inputs
from tests.helpers import run as references

from .dynet_peer import STRATEGIES, NoPeer, Worker, is_built, native_trees, python_model
from .harness import Probe, geometric_mean
from .machine import ROOT, commit
from .runner import Outcome, Run

SST = Path(os.environ.get("PLAIT_DATA", ROOT.parent / "shared" / "data")) / "sst" / "train.txt"
KEPT = ROOT / "build" / "batching.json"
BATCHES = 6  # of different instances, by turns
ROUNDS = 12
EAGER_ROUNDS = 3
WARM = 12  # calls until everything is compiled and compared with running one by one
Nested = Any  # a tree as nested lists of two, words their numbers


# -- instances --------------------------------------------------------------------------------------------------------------


def treebank(count: int, rng: random.Random) -> list[Nested]:
    """Binary trees of the Stanford Sentiment Treebank, words folded into WORDS; generated ones where there is none."""
    if not SST.exists():
        return [_grown(rng, rng.randrange(5, 34)) for _ in range(count)]
    lines = SST.read_text(encoding="utf-8").splitlines()
    words: dict[str, int] = {}

    def parse(tokens: list[str]) -> Nested:
        assert tokens.pop() == "("
        tokens.pop()
        if tokens[-1] != "(":
            found: Nested = words.setdefault(tokens.pop().lower(), len(words)) % WORDS
        else:
            found = [parse(tokens), parse(tokens)]
        assert tokens.pop() == ")"
        return found

    return [parse(re.findall(r"[()]|[^() ]+", line)[::-1]) for line in rng.sample(lines, count)]


def _grown(rng: random.Random, leaves: int) -> Nested:
    if leaves == 1:
        return rng.randrange(WORDS)
    cut = rng.randrange(1, leaves)
    return [_grown(rng, cut), _grown(rng, leaves - cut)]


def _tree(t: Nested) -> Tree:
    return Tree(left=_tree(t[0]), right=_tree(t[1])) if isinstance(t, list) else Tree(word=t)


def _vector(rng: random.Random, *shape: int) -> Any:
    if len(shape) > 1:
        return [_vector(rng, *shape[1:]) for _ in range(shape[0])]
    return [rng.gauss(0, 1) for _ in range(shape[0])]


@dataclass(frozen=True)
class Subject:
    """A model with instances as JSON holds them, and how they become the model's arguments. `waits`: it asks for values."""

    make: Callable[[int], nn.Module]
    instances: Callable[[random.Random, int, int], list[Any]]  # rng, count, hidden
    columns: Callable[[list[Any]], tuple[list[Any], ...]]
    waits: bool = False
    peer: bool = True


def _words(rng: random.Random, n: int, _: int) -> list[Any]:
    return [[rng.randrange(WORDS) for _ in range(rng.randrange(5, 20))] for _ in range(n)]


SUBJECTS = {
    "TreeLSTM": Subject(batched_models.TreeLSTM, lambda r, n, _: treebank(n, r), lambda b: ([_tree(t) for t in b],)),
    "MV-RNN": Subject(batched_models.MVRNN, lambda r, n, _: treebank(n, r), lambda b: ([_tree(t) for t in b],)),
    "BiRNN": Subject(
        batched_models.BiRNN,
        lambda r, n, h: [_vector(r, r.randrange(8, 30), h) for _ in range(n)],
        lambda b: ([list(torch.tensor(x).unbind(0)) for x in b],),
    ),
    "NestedRNN": Subject(
        batched_models.NestedRNN,
        lambda r, n, h: [[_vector(r, h), [r.randrange(5, 10) for _ in range(r.randrange(5, 10))]] for _ in range(n)],
        lambda b: ([torch.tensor(x) for x, _ in b], [steps for _, steps in b]),
    ),
    "DRNN": Subject(
        batched_models.DRNN,
        lambda r, n, h: [_vector(r, h) for _ in range(n)],
        lambda b: ([torch.tensor(x) for x in b],),
        waits=True,
    ),
    "StackRNN": Subject(batched_models.StackRNN, _words, lambda b: (b,), waits=True),
    "early exit": Subject(
        lambda hidden: batched_models.EarlyExit(hidden, 12),
        lambda r, n, h: [_vector(r, 32, h) for _ in range(n)],
        lambda b: ([torch.tensor(x) for x in b],),
        waits=True,
        peer=False,
    ),
}  # fmt: skip


def total(results: Any) -> Tensor:
    """The sum of all results."""
    leaves = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
    if len({x.shape for x in leaves}) == 1:
        return torch.stack(leaves).sum()
    return torch.stack([x.sum() for x in leaves]).sum()


# -- letter a, e ------------------------------------------------------------------------------------------------------------


def equal(run: Run) -> Outcome:
    """The seven models against their instances one by one, compiled, forward and gradients."""
    detail: dict[str, Any] = {}
    for name, case in CASES.items():
        run.say(name)
        torch.manual_seed(0)
        model = case.make()
        batched = plait.autobatch(model, without=("opt-out",))
        rng = random.Random(2)
        worst = {"forward": 0.0, "gradient": 0.0}
        for n in (5, 3, 8, 8) if run.quick else (5, 3, 1, 8, 8, 8, 16, 2, 1, 32, 64):
            columns = case.columns(rng, n)
            expected = [model(*given) for given in zip(*columns, strict=True)]
            got = batched(*columns)
            worst["forward"] = max(worst["forward"], _distance(got, expected))
            if case.trains:
                wanted = list(model.parameters())
                grads = [
                    torch.autograd.grad(total(r), wanted, allow_unused=True, materialize_grads=True) for r in (got, expected)
                ]
                worst["gradient"] = max(worst["gradient"], _distance(*grads))
        rows = batched.report().rows
        detail[name] = worst | {"compiled": all(r.runs.startswith("compiled") for r in rows)}
    right = sum(max(d["forward"], d["gradient"]) < 1e-5 for d in detail.values())
    furthest = max(max(d["forward"], d["gradient"]) for d in detail.values())
    return Outcome({"right": f"{right} of {len(CASES)}", "furthest": f"{furthest:.1e}"}, right == len(CASES), detail)


def _distance(got: Any, expected: Any) -> float:
    """The largest difference, over the largest number of the tensor it is in; other data must be the same."""
    worst = 0.0
    for x, y in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(y, Tensor):
            if x.shape != y.shape or x.dtype != y.dtype:
                return float("inf")
            if y.numel():
                x, y = (t.detach().to(torch.complex128) for t in (x, y))
                far = float((x - y).abs().max()) / max(float(y.abs().max()), 1.0)
                worst = float("inf") if math.isnan(far) else max(worst, far)
        elif x != y:
            return float("inf")
    return worst


def generated(run: Run) -> Outcome:
    """Generated programs with control flow against their instances one by one."""
    count = 6 if run.quick else 300
    wrong: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            run.say(f"seed {seed}")
            torch.manual_seed(0)
            model = control_flow.load(seed, Path(folder))
            batched = plait.autobatch(model, compile_after=None, without=("opt-out",))
            rng = random.Random(seed)
            for n in (4, 6, 2):
                instances = [control_flow.node(rng, rng.randrange(3)) for _ in range(n)]
                if not _distance(batched(instances), [model(x) for x in instances]) < 1e-5:
                    wrong.append(seed)
    return Outcome({"programs": count, "wrong": len(set(wrong))}, not wrong, {"seeds": f"0 to {count - 1}", "wrong": wrong})


# -- letter b ---------------------------------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Setting:
    """One row: a model at one size."""

    name: str
    hidden: int
    batch: int
    train: bool = False
    threads: int = 1

    def title(self) -> str:
        """The row's name."""
        parts = [self.name, f"width {self.hidden}", f"{self.batch} instances", "training" if self.train else "forward"]
        return ", ".join([*parts, "one thread" if self.threads == 1 else "all threads"])


def settings(*, quick: bool) -> list[Setting]:
    """All rows."""
    if quick:
        return [Setting("TreeLSTM", 64, 64)]
    every = torch.get_num_threads()
    sizes = [(h, b) for h in (32, 64, 256) for b in (8, 64)]
    found = [Setting("TreeLSTM", h, b) for h, b in sizes]
    found += [Setting("TreeLSTM", h, 64, True) for h in (32, 64, 256)]
    found += [Setting("TreeLSTM", h, 64, train, every) for h in (64, 256) for train in (False, True)]
    found += [Setting("MV-RNN", h, b) for h, b in ((32, 8), (32, 64), (64, 8), (64, 64))]
    found += [
        Setting(name, h, b) for name in ("BiRNN", "NestedRNN", "DRNN", "StackRNN") for h, b in ((32, 8), (32, 64), (256, 64))
    ]
    found += [Setting("early exit", h, 64, False, t) for h in (64, 256) for t in {1, every}]
    return found


class Contest:
    """One row's contenders: plait, eager one by one, and DyNet's strategies, each a function that gives seconds."""

    def __init__(self, setting: Setting, folder: Path, *, peer: bool, without: Sequence[str] = ()) -> None:
        self.setting = setting
        subject = SUBJECTS[setting.name]
        torch.manual_seed(0)
        rng = random.Random(0)
        self.model = subject.make(setting.hidden)
        plain = [subject.instances(rng, setting.batch, setting.hidden) for _ in range(BATCHES)]
        self.batches = [subject.columns(b) for b in plain]
        self.batched = plait.autobatch(self.model, without=without)
        self.workers: dict[str, Callable[[], tuple[float, float]]] = {}
        self.open: list[Worker] = []
        if peer and subject.peer:
            self._add_peers(subject, plain, folder)

    def _add_peers(self, subject: Subject, plain: list[Any], folder: Path) -> None:
        s = self.setting
        how = "1" if s.train else "0"
        for strategy in STRATEGIES:
            worker = python_model(folder, s.name, s.hidden, strategy, self.model, plain)
            self.open.append(worker)
            self.workers[f"dynet python {strategy}"] = lambda w=worker: w.run(how)
            if subject.waits and not s.train:
                self.workers[f"dynet lock step {strategy}"] = lambda w=worker: w.run("2")
        if s.name == "TreeLSTM":
            worker = native_trees(folder, s.hidden, WORDS, plain)
            self.open.append(worker)
            for strategy in STRATEGIES:
                self.workers[f"dynet c++ {strategy}"] = lambda w=worker, k=strategy: w.run(f"{k} {how}")

    def plait(self, at: int) -> float:
        """One batch, batched."""
        return self._run(lambda columns: self.batched(*columns), at)

    def eager(self, at: int) -> float:
        """One batch, one by one."""
        return self._run(lambda columns: [self.model(*given) for given in zip(*columns, strict=True)], at)

    def _run(self, call: Callable[[tuple[list[Any], ...]], Any], at: int) -> float:
        columns = self.batches[at % BATCHES]
        with torch.set_grad_enabled(self.setting.train):
            started = time.perf_counter()
            results = call(columns)
            if self.setting.train:
                total(results).backward()
            seconds = time.perf_counter() - started
        for p in self.model.parameters():
            p.grad = None
        return seconds

    def close(self) -> None:
        """End the peers' processes."""
        for worker in self.open:
            worker.close()

    def check(self) -> float:
        """How far DyNet's sums are from eager's, relative, where both have the same parameters."""
        worst = 0.0
        with torch.no_grad():
            expected = float(total([self.model(*given) for given in zip(*self.batches[0], strict=True)]))
        for name, run in self.workers.items():
            if "python" in name:
                worst = max(worst, abs(run()[1] - expected) / max(abs(expected), 1.0))
        return worst


def contest(setting: Setting, folder: Path, probe: Probe, *, peer: bool, rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians in milliseconds of all contenders, by turns."""
    with threads(setting.threads):
        c = Contest(setting, folder, peer=peer)
        try:
            apart = c.check() if c.workers and not setting.train else 0.0
            for k in range(WARM):
                c.plait(k)
            c.eager(0)
            for run in c.workers.values():
                run()
            samples: dict[str, list[float]] = {}
            for k in range(2 * rounds):
                found = {"plait": _second(lambda k=k: c.plait(k))}
                found |= {name: _second(lambda run=run: run()[0]) for name, run in c.workers.items()}
                if k < EAGER_ROUNDS:  # long enough to be timed in any round
                    samples.setdefault("eager", []).append(1e3 * _second(lambda k=k: c.eager(k)))
                if probe.quiet() or k >= rounds:
                    for name, seconds in found.items():
                        samples.setdefault(name, []).append(1e3 * seconds)
                if len(samples.get("plait", ())) >= rounds:
                    break
        finally:
            c.close()
    row: dict[str, Any] = {name: statistics.median(x) for name, x in samples.items()}
    counts = c.batched.report().counts
    row |= {"launches": counts.launches, "dynet's sums differ by": apart}
    seconds = counts.seconds
    row["parts"] = {k: round(1e3 * getattr(seconds, k), 3) for k in ("host", "scheduling", "gathers", "kernels")}
    return row


def _second(call: Callable[[], float]) -> float:
    """What the second of two calls takes: the first one finds the caches as another contender has left them, which matters
    for calls that are short."""
    first = call()
    return call() if first < 0.3 else first


def _best(row: dict[str, Any], kind: str) -> float | None:
    found = [x for name, x in row.items() if name.startswith(kind)]
    return min(found) if found else None


def beside(run: Run) -> Outcome:
    """Every model beside DyNet and eager."""
    rows: dict[str, dict[str, Any]] = {}
    probe, peer = Probe(), is_built() or not run.quick
    if not peer:
        run.notes.append("DyNet is left out: a run without --quick builds it")
    kept = None if run.quick or commit().endswith("+") else _kept_rows()
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings(quick=run.quick):
            run.say(setting.title())
            if kept is not None and setting.title() in kept:
                rows[setting.title()] = kept[setting.title()]
                continue
            try:
                rows[setting.title()] = contest(setting, Path(folder), probe, peer=peer, rounds=3 if run.quick else ROUNDS)
            except NoPeer as why:
                run.notes.append(str(why))
                peer = False
                rows[setting.title()] = contest(setting, Path(folder), probe, peer=False)
            rows[setting.title()] |= _ratios(rows[setting.title()])
            if kept is not None:
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps({"commit": commit(), "rows": rows}))
    figure = _figures(rows)
    goals = {
        "TreeLSTM over C++, width 32": 2.5, "TreeLSTM over C++, width 64": 2.5, "TreeLSTM over C++, width 256": 1.5,
        "TreeLSTM over Python, width 32": 3.0, "TreeLSTM over Python, width 64": 3.0, "TreeLSTM over Python, width 256": 1.9,
        "TreeLSTM training over C++": 2.0, "DRNN over naive": 4.0, "DRNN over lock step": 1.5, "StackRNN over naive": 4.0,
        "StackRNN over lock step": 1.5, "early exit over eager, one thread": 1.8, "early exit over eager, all threads": 3.0,
        "MV-RNN over the best": 1.5, "slowest over eager": 1.0,
    }  # fmt: skip
    shown_goals = {name: goal for name, goal in goals.items() if not run.quick or figure.get(name) is not None}
    holds = peer and all(figure.get(name) is not None and figure[name] >= goal for name, goal in shown_goals.items())
    shown = {k: f"{v:.2f}x" if v is not None else "not measured" for k, v in figure.items()}
    return Outcome(shown, holds, {"rows": rows, "goals": goals})


def _kept_rows() -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run at this commit."""
    found = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return found["rows"] if found.get("commit") == commit() else {}


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    kinds = {
        "over eager": "eager",
        "over C++": "dynet c++",
        "over Python": "dynet python",
        "over lock step": "dynet lock step",
    }
    return {name: best / row["plait"] for name, kind in kinds.items() if (best := _best(row, kind)) is not None}


def _figures(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    def worst(ratio: str, *parts: str) -> float | None:
        found = [r[ratio] for title, r in rows.items() if ratio in r and all(p in title for p in parts)]
        return min(found) if found else None

    figure: dict[str, float | None] = {}
    for h in (32, 64, 256):
        for kind in ("C++", "Python"):
            row = worst(f"over {kind}", "TreeLSTM", f"width {h},", "64 instances", "forward", "one thread")
            figure[f"TreeLSTM over {kind}, width {h}"] = row
    figure["TreeLSTM training over C++"] = worst("over C++", "TreeLSTM", "64 instances", "training", "one thread")
    for name in ("DRNN", "StackRNN"):
        figure[f"{name} over naive"] = worst("over Python", name, "64 instances")
        figure[f"{name} over lock step"] = worst("over lock step", name, "64 instances")
    figure["early exit over eager, one thread"] = worst("over eager", "early exit", "64 instances", "one thread")
    figure["early exit over eager, all threads"] = worst("over eager", "early exit", "64 instances", "all threads")
    both = [min(r["over eager"], r.get("over Python", r["over eager"])) for t, r in rows.items() if "MV-RNN" in t]
    figure["MV-RNN over the best"] = min(both) if both else None
    figure["slowest over eager"] = worst("over eager")
    ratios = [r["over Python"] for r in rows.values() if "over Python" in r]
    figure["geometric mean over DyNet's Python"] = geometric_mean(ratios) if ratios else None
    return figure


# -- letter c ---------------------------------------------------------------------------------------------------------------

ABLATED = tuple(name for name in SWITCHES if name != "opt-out")


def ablation(run: Run) -> Outcome:
    """What each optimisation is worth, and the launches of every model beside DyNet's."""
    table: dict[str, dict[str, Any]] = {}
    names = ("TreeLSTM",) if run.quick else tuple(SUBJECTS)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        for name in names:
            setting = Setting(name, 64, 64)
            contests: dict[str, Contest] = {}
            for left_out in ("", *ABLATED):
                run.say(f"{name} without {left_out or 'nothing'}")
                without = ("opt-out", left_out) if left_out else ("opt-out",)
                contests[left_out or "everything"] = c = Contest(setting, Path(folder), peer=False, without=without)
                for k in range(WARM if left_out != "blocks" else 5):  # op by op nothing is left to be found out
                    c.plait(k)
            times: dict[str, list[float]] = {left_out: [] for left_out in contests}
            for k in range(7):
                for left_out, c in contests.items():
                    times[left_out].append(1e3 * _second(lambda c=c, k=k: c.plait(k)))
            rows: dict[str, Any] = {
                left_out: {"ms": statistics.median(times[left_out]), "launches": c.batched.report().counts.launches}
                for left_out, c in contests.items()
            }
            for row in rows.values():
                row["times as long"] = row["ms"] / rows["everything"]["ms"]
            if SUBJECTS[name].peer and (is_built() or not run.quick):
                rows["dynet"] = {"launches": _peer_launches(setting, Path(folder), run)}
            table[name] = rows
    fewer = {
        name: rows["dynet"]["launches"] / rows["everything"]["launches"]
        for name, rows in table.items()
        if rows.get("dynet", {}).get("launches")
    }
    figure = {name: f"{ratio:.1f} times fewer launches" for name, ratio in fewer.items()}
    return Outcome(figure, bool(fewer) and min(fewer.values()) >= 4, table)


def _peer_launches(setting: Setting, folder: Path, run: Run) -> int | None:
    """Batches of nodes, parameters left out, that DyNet's best strategy runs for one batch of instances."""
    rng = random.Random(0)
    torch.manual_seed(0)
    subject = SUBJECTS[setting.name]
    model, found = subject.make(setting.hidden), []
    plain = [subject.instances(rng, setting.batch, setting.hidden)]
    try:
        for strategy in STRATEGIES:
            worker = python_model(folder, setting.name, setting.hidden, strategy, model, plain, profile=True)
            lines = worker.lines("2" if subject.waits else "0")
            worker.close()
            found.append(sum(line.startswith("BatchSize:") and "parameters(" not in line for line in lines))
    except NoPeer as why:
        run.notes.append(str(why))
        return None
    return min(found)


# -- letter d ---------------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> Outcome:
    """The blocks of every model as Triton kernels: interpreted beside the references, and compiled for sm_90."""
    detail: dict[str, Any] = {}
    names = ("TreeLSTM",) if run.quick else tuple(CASES)
    with tempfile.TemporaryDirectory() as folder, Interpreter() as interpreter:
        for name in names:
            run.say(name)
            detail[name] = _triton(name, interpreter, Cache(Path(folder)))
    wrong = [f"{name}: {g}" for name, d in detail.items() for g in d["wrong"]]
    compiled = sum(d["binaries"] for d in detail.values())
    graphs = sum(d["graphs"] for d in detail.values())
    figure = {"models": len(detail), "graphs": graphs, "wrong": len(wrong), "kernels compiled for sm_90": compiled}
    return Outcome(figure | {"on a GPU": "not measured"}, not wrong and compiled > 0, detail | {"wrong": wrong})


def _triton(name: str, interpreter: Interpreter, cache: Cache) -> dict[str, Any]:
    case = CASES[name]
    torch.manual_seed(0)
    model, rng = case.make(), random.Random(2)
    batched = plait.autobatch(model, without=("opt-out",))
    with plait.observe() as seen:
        for _ in range(WARM):
            total(batched(*case.columns(rng, 8))).backward()
    found: dict[str, Any] = {"graphs": 0, "binaries": 0, "launches": 0, "calls": 0, "wrong": []}
    for record in {repr(r.graph): r for r in seen.graphs}.values():
        made = compile_graph(retarget(record.graph), CodegenOptions(target="cuda:90"))
        inputs = random_inputs(record.graph)
        got = run_interpreted(made, copies(inputs), interpreter)
        found["graphs"] += 1
        found["launches"] += sum(isinstance(s, Launch) for s in made.plan.steps)
        found["calls"] += sum(isinstance(s, Call) for s in made.plan.steps)
        found["binaries"] += sum(map(len, binaries(made.plan, made.sources, "cuda:90", cache).values()))
        expected = references(record.graph, inputs)
        if not _distance([x for x in got if isinstance(x, Tensor)], [x for x in expected if isinstance(x, Tensor)]) < 1e-5:
            found["wrong"].append(record.name)
    return found
