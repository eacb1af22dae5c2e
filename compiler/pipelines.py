"""The pipelines: which passes run at each capture point, in order, as plain lists; and how one is run and observed.

`forward` and `joint` hold what was asked for; the ground passes run on what is compiled: the forward and the backward of
a training step (`split`), or a graph without autograd.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._logging import trace_structured

from ..codegen.compile import CompiledGraph
from ..errors import InterfaceChanged
from ..ir import Graph, TensorType, Value
from ..passes.base import CapturePoint, Context, Pass, Step, run_pipeline
from ..passes.fold import Fold
from ..passes.layout import Layout
from ..passes.normalise import Normalise
from ..passes.prune import Prune
from ..passes.share import Share
from ..passes.simplify import Simplify
from . import decisions
from .debugging.budget import Budget
from .debugging.interpret import random_inputs
from .debugging.ledger import check_ledger
from .decisions import Decisions

if TYPE_CHECKING:
    from .options import Options

log = logging.getLogger(__name__)


def ground() -> list[Pass]:
    """Passes that every compiled graph goes through."""
    return [
        Normalise(),  # one spelling for each operation, which the others match
        Fold(),
        Simplify(),
        Share(),
        Layout(),  # views move once sharing has shown who uses what
        Prune(),
    ]


def passes(point: CapturePoint, options: Options) -> list[Pass]:
    """The passes that run at a capture point: those asked for that belong there, then, on what is compiled, the ground
    passes. A pass that can run anywhere runs on what is compiled."""
    if point == "split":
        found = [*(p for p in options.passes if p.at in ("split", "any")), *ground()]
    else:
        found = [p for p in options.passes if p.at == point]
    return [options.apply(p) for p in found if p.name not in options.disable_passes]


@dataclass
class Session:
    """One compilation: its options and what watches it. `name` labels logs and dumps."""

    name: str
    options: Options
    decisions: Decisions = field(init=False)
    budget: Budget | None = field(init=False)

    def __post_init__(self) -> None:
        self.decisions = decisions.current(self.options.bisect_limit)
        self.budget = None if self.options.max_rel_err is None else Budget(self.options.max_rel_err)

    def run(
        self,
        graph: Graph,
        point: CapturePoint,
        inputs: Sequence[Any] | None = None,
        devices: Sequence[str] = ("cpu",),
    ) -> tuple[Graph, list[Step]]:
        """Run the pipeline of a capture point over a graph. The graph's inputs and outputs keep their types.

        With `verify="each-pass"` numerics are judged on `inputs`, by default random ones. Raises what `run_pipeline`
        raises, InterfaceChanged, and then NumericsBroken.
        """
        chosen = passes(point, self.options)
        watch = self._watch(graph)
        ctx = Context(at=point, devices=tuple(devices), allow=self.decisions)
        verify: Any = self.options.verify
        given = random_inputs(graph) if inputs is None and (verify == "each-pass" or self.budget is not None) else inputs
        refuse = self.budget.on(graph, given or ()) if self.budget is not None else None
        after, steps = run_pipeline(graph, chosen, ctx, verify=verify, on_step=watch, refuse=refuse)
        _check_interface(graph, after, point, chosen)
        if verify == "each-pass":
            check_ledger(graph, steps, given or ())
        return after, steps

    def dump_compiled(self, compiled: CompiledGraph) -> None:
        """Write kernel sources and coverage to the dump folder and the structured log, where these are on."""
        label = f"{self.name}_{compiled.graph.name}"
        coverage = json.dumps(dataclasses.asdict(compiled.coverage), indent=1)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"plait_{label}_coverage", "encoding": "json"},
            payload_fn=lambda: coverage,
        )
        log.info("%s: %s", label, compiled.coverage)
        if self.options.dump_dir:
            folder = Path(self.options.dump_dir) / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "coverage.json").write_text(coverage)
            for name, text in compiled.sources.items():
                (folder / f"{name}.cpp").write_text(text)

    def _watch(self, first: Graph) -> Callable[[Step], None]:
        label = f"{self.name}_{first.name}"
        folder = Path(self.options.dump_dir) / label if self.options.dump_dir else None
        count = 0

        def show(name: str, graph: Graph) -> None:
            nonlocal count
            trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": f"plait_{label}_{count:03d}_{name}", "encoding": "string"},
                payload_fn=lambda: str(graph),
            )
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{count:03d}_{name}.txt").write_text(str(graph))
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s after %s:\n%s", label, name, graph)
            count += 1

        def on_step(step: Step) -> None:
            log.info(
                "%s: %s %d -> %d nodes, %.1f ms%s", label, step.pass_name, len(step.before.nodes), len(step.after.nodes),
                1e3 * step.seconds, "".join(f", {rule} x{n}" for rule, n in sorted(step.fired.items())),
            )  # fmt: skip
            show(step.pass_name, step.after)
            if step.pass_name in self.options.print_after or "all" in self.options.print_after:
                print(f"# {label} after {step.pass_name}\n{step.after}", file=sys.stderr)

        show("captured", first)
        return on_step


def _check_interface(before: Graph, after: Graph, point: str, chosen: Sequence[Pass]) -> None:
    """Callers were promised shapes, dtypes and strides at capture: a pass must not change them."""
    for what, old, new in (
        ("the inputs", before.inputs, after.inputs),
        ("the outputs", before.outputs, after.outputs),
        ("the written inputs", [v for _, v in before.writes], [v for _, v in after.writes]),
    ):
        was, now = ([v.type if _is_tensor(v) else None for v in vs] for vs in (old, new))
        if was != now:
            raise InterfaceChanged(
                pipeline=point, what=what, graph=before.name,
                before=", ".join(map(str, was)), after=", ".join(map(str, now)),
                passes=", ".join(p.name for p in chosen),
            )  # fmt: skip


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Value) and isinstance(x.type, TensorType)
