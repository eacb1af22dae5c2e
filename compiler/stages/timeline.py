"""A plan as pictures: a Chrome trace, an SVG, an HTML page. None of them refers to anything outside itself.

A row is a rank: what it computes, with the number of the micro-batch where there is room, and below it what it sends (first
to ranks of higher numbers, then to those of lower ones) and its sums of gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from ... import __version__
from ...cost.microbatches import Action
from ...cost.schedule import Task
from ...cost.stages import compute
from ...errors import BadSchedule
from ...passes.stages.plan import Plan, Step, idle_share
from ..terminal import milliseconds, size
from .summary import Summary, named, percent

TEMPLATE = Path(__file__).with_name("page.html")

KINDS = {
    "F": "forward",
    "C": "forward of self-conditioning (C)",
    "B": "backward",
    "I": "backward, inputs (I)",
    "W": "backward, weights (W)",
    "update": "optimizer",
    "frozen": "frozen layers, next batch",
    "send": "sends",
    "sum": "sum of gradients",
    "track": "idle",
}
"""What boxes stand for, in the order of the legend."""


@dataclass(frozen=True, slots=True)
class Box:
    """Something that happens on a rank: one of KINDS, seconds, what is written on it and what is said where a pointer rests
    on it. Lane 0 is computation, the others are below it. `second`: of the second backbone."""

    kind: str
    rank: int
    lane: int
    start: float
    end: float
    label: str
    title: str
    second: bool = False


def steps_of(plan: Plan) -> list[tuple[str, Step]]:
    """The kinds of steps that a plan has, with their names."""
    if plan.conditioned is None:
        return [("predicted", plan.step)]
    return [("predicted, plain", plan.step), ("predicted, self-conditioned", plan.conditioned)]


def boxes(plan: Plan, step: Step) -> Iterator[Box]:
    """All that happens in a step, frozen layers included."""
    ranks = range(len(step.schedule.ranks))
    computing = {compute(rank): rank for rank in ranks}
    for task, span in zip(step.timeline.tasks, step.timeline.spans, strict=True):
        rank, lane, kind = _place(task, computing)
        action = _action(task) if lane == 0 else None
        label = "" if action is None or action.microbatch is None else str(action.microbatch)
        second = action is not None and action.stage not in step.schedule.chains[0]
        title = f"{task.name}, {task.stream}: {_times(span.start, span.end)}"
        yield Box(kind, rank, lane, span.start, span.end, label, title, second)
    frozen = plan.problem.profile.frozen
    for rank in ranks:
        for piece in step.filling.pieces[rank]:
            name, end = frozen[piece.layer].name, piece.start + piece.seconds
            title = f"{name}, rows {piece.low} to {piece.high} of the next batch: {_times(piece.start, end)}"
            yield Box("frozen", rank, 0, piece.start, end, name, title)


def _place(task: Task, computing: dict[str, int]) -> tuple[int, int, str]:
    """The rank, lane and kind of a task."""
    if task.stream in computing:
        action = _action(task)
        return computing[task.stream], 0, "update" if action is None else action.kind
    first, _, last = task.stream.partition(" to ")
    if last:
        return int(first), 1 if int(last) > int(first) else 2, "send"
    return int(task.stream.removeprefix("sums ")), 3, "sum"


def _action(task: Task) -> Action | None:
    try:
        return Action.of(task.name)
    except BadSchedule:
        return None  # an update of parameters


def _times(start: float, end: float) -> str:
    return f"{1e3 * start:.2f} to {1e3 * end:.2f} ms ({milliseconds(end - start)})"


# -- Chrome trace -------------------------------------------------------------------------------------------------------


def trace(plan: Plan) -> list[dict[str, Any]]:
    """Events of a Chrome trace: a process for each kind of step, threads for ranks, links and sums; frozen layers are events
    of their ranks. Times are microseconds."""
    found: list[dict[str, Any]] = []
    for process, (label, step) in enumerate(steps_of(plan)):
        events = step.timeline.trace(process, label)
        threads = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
        computing = [compute(rank) for rank in range(len(step.schedule.ranks))]
        order = [*computing, *sorted(set(threads) - set(computing))]
        found += events
        found += [
            {"ph": "M", "pid": process, "tid": threads[name], "name": "thread_sort_index", "args": {"sort_index": i}}
            for i, name in enumerate(order)
        ]
        frozen = plan.problem.profile.frozen
        found += [
            {
                "ph": "X", "pid": process, "tid": threads[compute(rank)], "name": frozen[piece.layer].name,
                "ts": 1e6 * piece.start, "dur": 1e6 * piece.seconds,
                "args": {"rows": f"{piece.low} to {piece.high}", "bubble": piece.bubble},
            }
            for rank, pieces in enumerate(step.filling.pieces)
            for piece in pieces
        ]  # fmt: skip
    return found


# -- SVG ----------------------------------------------------------------------------------------------------------------

WIDTH = (1000, 3200)
"""Pixels of the time axis: at least, and at most where there are many actions."""
WIDTH_OF_ACTION = 12
LEFT, RIGHT, LINE = 136, 24, 18
ROW, LANE, GAP = 24, 5, 8
LETTER = 5.9
"""Pixels of a letter in a box, on average."""

STYLE = """
.plan-timeline text { font: 10px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328; }
.plan-timeline text.title { font-size: 14px; font-weight: 600; }
.plan-timeline text.label { font-size: 12px; }
.plan-timeline text.quiet { fill: #59636e; }
.plan-timeline .back { fill: #ffffff; }
.plan-timeline .track { fill: #e8ebef; }
.plan-timeline .grid { stroke: #c3c9d0; stroke-width: .6; }
.plan-timeline .end { stroke: #1f2328; stroke-width: 1.2; stroke-dasharray: 4 3; }
.plan-timeline .box { stroke: #000000; stroke-opacity: .45; stroke-width: .4; }
.plan-timeline .F { fill: #0072b2; } .plan-timeline .C { fill: #8ecbf0; }
.plan-timeline .B { fill: #e69f00; } .plan-timeline .I { fill: #d55e00; } .plan-timeline .W { fill: #f0e442; }
.plan-timeline .update { fill: #4d4d4d; } .plan-timeline .frozen { fill: #cc79a7; }
.plan-timeline .send { fill: #57606a; } .plan-timeline .sum { fill: #009e73; }
.plan-timeline text.on { fill: #000000; pointer-events: none; text-anchor: middle; }
.plan-timeline text.on.F, .plan-timeline text.on.update { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  .plan-timeline text { fill: #e6edf3; }
  .plan-timeline text.quiet { fill: #9198a1; }
  .plan-timeline .back { fill: #0d1117; }
  .plan-timeline .track { fill: #262c36; }
  .plan-timeline .grid { stroke: #3d444d; }
  .plan-timeline .end { stroke: #e6edf3; }
  .plan-timeline .update { fill: #b0b0b0; } .plan-timeline .send { fill: #b7bfc8; }
  .plan-timeline text.on, .plan-timeline text.on.update { fill: #000000; }
}
"""


def svg(plan: Plan) -> str:
    """The picture, one part for each kind of step, all with the same scale."""
    parts = [(name, step, list(boxes(plan, step))) for name, step in steps_of(plan)]
    busiest = max(sum(b.lane == 0 and b.rank == rank for b in part) for _, _, part in parts for rank in range(_ranks(plan)))
    width = min(max(WIDTH[0], WIDTH_OF_ACTION * busiest), WIDTH[1])
    scale = width / (max(step.seconds for _, step, _ in parts) or 1.0)
    drawn: list[str] = []
    top = float(LINE)
    for name, step, part in parts:
        panel = _Panel(plan, step, part, name, scale, width, top)
        drawn += panel.drawn()
        top = panel.bottom + LINE
    whole = LEFT + width + RIGHT
    said = escape(f"{plan}: {_figures(plan, plan.step)}")
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plan-timeline" role="img" aria-label="{said}" '
        f'width="{whole:g}" height="{top:g}" viewBox="0 0 {whole:g} {top:g}">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{whole:g}" height="{top:g}"/>',
        *drawn,
        "</svg>\n",
    ])  # fmt: skip


def _ranks(plan: Plan) -> int:
    return len(plan.partition.replicas)


def _figures(plan: Plan, step: Step) -> str:
    words = f"step {milliseconds(step.seconds)}, bubbles {percent(idle_share(step, plan.partition.replicas))}"
    filled = plan.problem.profile.frozen and step is plan.step
    return f"{words} ({percent(plan.unfilled_share)} without frozen layers in them)" if filled else words


class _Panel:
    """One kind of step. Vertical positions are pixels from the top of the picture."""

    def __init__(
        self, plan: Plan, step: Step, found: Sequence[Box], name: str, scale: float, width: float, top: float
    ) -> None:
        self.plan, self.step, self.boxes, self.name, self.scale, self.width = plan, step, found, name, scale, width
        lanes = sorted({b.lane for b in found if b.lane})
        self.lanes = {lane: ROW + 1 + i * LANE for i, lane in enumerate(lanes)}  # where each begins within its row
        self.height = ROW + (1 + LANE * len(lanes) if lanes else 0)
        self.top = top
        self.legend = list(self._legend(top + 2 * LINE))
        self.first = self.legend[-1][1] + LINE + 6  # the top of the first row
        self.axis = self.first + _ranks(plan) * (self.height + GAP)
        self.bottom = self.axis + 2 * LINE

    def drawn(self) -> Iterator[str]:
        several = self.plan.conditioned is not None
        title = f"{self.plan}{f' ({self.name})' if several else ''}"
        yield _text(LEFT, self.top, title, "title")
        yield _text(LEFT, self.top + LINE, _figures(self.plan, self.step), "label")
        for kind, y, x, words in self.legend:
            if kind == "end":
                yield f'<line class="end" x1="{x + 5:g}" x2="{x + 5:g}" y1="{y - 11:g}" y2="{y + 3:g}"/>'
            elif kind != "second":
                yield f'<rect class="key {kind}" x="{x:g}" y="{y - 9:g}" width="11" height="11"/>'
            yield _text(x + (0 if kind == "second" else 15), y, words)
        yield from self._rows()
        yield from self._grid()
        for box in self.boxes:
            yield from self._box(box)
        yield from self._end()

    def _legend(self, top: float) -> Iterator[tuple[str, float, float, str]]:
        """(kind, y, x, words), in as many lines as they need."""
        used = {b.kind for b in self.boxes} | {"track"}
        entries = [(kind, words) for kind, words in KINDS.items() if kind in used]
        if any(b.second for b in self.boxes):
            entries.append(("second", "low boxes: second backbone"))
        if self.step.seconds > self.step.timeline.seconds:
            entries.append(("end", "what follows runs behind the step"))
        x, y = float(LEFT), top
        for kind, words in entries:
            length = 15 + LETTER * len(words) + 14
            if x > LEFT and x + length > LEFT + self.width:
                x, y = float(LEFT), y + LINE
            yield kind, y, x, words
            x += length

    def _rows(self) -> Iterator[str]:
        layers: dict[int, list[str]] = {}
        for stage in Summary(self.plan).stages:
            layers.setdefault(stage.rank, []).append(f"stage {stage.number}: {named(stage.layers)}")
        for rank, replicas in enumerate(self.plan.partition.replicas):
            y = self._y(rank)
            told = escape("; ".join(layers[rank]))
            many = f" ({replicas} devices)" if replicas > 1 else ""
            yield (
                f'<text class="label" x="{LEFT - 8}" y="{y + ROW / 2 + 4:g}" text-anchor="end">rank {rank}{many}'
                f"<title>{told}</title></text>"
            )
            yield f'<rect class="track" x="{LEFT}" y="{y:g}" width="{self.step.seconds * self.scale:.2f}" height="{ROW}"/>'

    def _y(self, rank: int) -> float:
        return self.first + rank * (self.height + GAP)

    def _grid(self) -> Iterator[str]:
        unit, factor = ("s", 1.0) if self.step.seconds >= 10 else ("ms", 1e3)
        for at in ticks(self.width / self.scale, int(self.width / 90)):
            x = LEFT + at * self.scale
            yield f'<line class="grid" x1="{x:.2f}" x2="{x:.2f}" y1="{self.first - 4:g}" y2="{self.axis + 4:g}"/>'
            words = f"{at * factor:.6g}"
            yield f'<text class="quiet" x="{x:.2f}" y="{self.axis + 16:g}" text-anchor="middle">{words}</text>'
        yield f'<text class="quiet" x="{LEFT - 8}" y="{self.axis + 16:g}" text-anchor="end">{unit}</text>'

    def _box(self, box: Box) -> Iterator[str]:
        x, width = LEFT + box.start * self.scale, (box.end - box.start) * self.scale
        y, height = self._y(box.rank), float(ROW)
        if box.lane:
            y, height = y + self.lanes[box.lane], LANE - 1.0
        elif box.second:
            y, height = y + ROW * 0.3, ROW * 0.7
        shape = {"send": "send", "sum": "sum", "frozen": "piece"}.get(box.kind, "action")
        yield (
            f'<rect class="box {shape} {box.kind}" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{height:g}">'
            f"<title>{escape(box.title)}</title></rect>"
        )
        if box.label and LETTER * len(box.label) + 2 <= width:
            yield _text(round(x + width / 2, 2), y + height / 2 + 3.5, box.label, f"on {box.kind}")

    def _end(self) -> Iterator[str]:
        if self.step.seconds > self.step.timeline.seconds:
            x = LEFT + self.step.timeline.seconds * self.scale
            yield f'<line class="end" x1="{x:.2f}" x2="{x:.2f}" y1="{self.first - 4:g}" y2="{self.axis + 4:g}"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def ticks(end: float, most: int) -> list[float]:
    """Round numbers from 0 to `end`, at most so many: multiples of 1, 2 or 5 times a power of ten."""
    if end <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(end / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if end / (power * k) <= most - 1 or k == 20)
    return list(itertools.takewhile(lambda at: at <= end * (1 + 1e-9), (step * i for i in itertools.count())))


# -- HTML ---------------------------------------------------------------------------------------------------------------


def page(plan: Plan) -> str:
    """The picture with the plan's tables, as a page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, percent=percent, named=named, milliseconds=milliseconds)
    summary = Summary(plan)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__, plan=plan, summary=summary, picture=svg(plan), problem=plan.problem,
        frozen=plan.problem.profile.frozen, filling=plan.step.filling,
    )  # fmt: skip


def write(plan: Plan, path: str | Path) -> None:
    """Write the page where the name ends in .html, else the SVG. Raises OSError."""
    Path(path).write_text(page(plan) if Path(path).suffix.lower() == ".html" else svg(plan), encoding="utf-8")


__all__ = ["KINDS", "Box", "boxes", "page", "steps_of", "svg", "ticks", "trace", "write"]
