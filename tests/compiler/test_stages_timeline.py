"""Pictures of plans: what is in a Chrome trace, an SVG and a page, that these are well formed and need nothing else."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plait.compiler.stages import timeline
from plait.compiler.tracing import write as write_trace
from plait.passes.stages.layers import Links
from plait.passes.stages.partition import Problem
from plait.passes.stages.plan import Filler, Plan, equal_layers, planned

from tests.compiler.stage_profiles import BACKBONE, curve, profile

SVG = "{http://www.w3.org/2000/svg}"


def made(
    schedule: str = "1f1b", *, stages: int = 2, microbatches: int = 4, devices: int = 4, fill: bool = True, **how: Any
) -> Plan:
    problem = Problem(profile(**how), devices, stages, microbatches, 8)
    return planned(problem, equal_layers(problem), schedule, Filler(use=fill))


PLANS = {
    "1f1b": made(),
    "gpipe": made("gpipe", frozen=False),
    "zero-bubble": made("zero-bubble", stages=4, microbatches=8),
    "two backbones": made("bidirectional", second=True),
    "self-conditioned": made(condition=0.5),
    "one device": made(stages=1, devices=1, microbatches=1),
    "unfilled": made(fill=False),
    "no links": made(links=Links()),
}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]


def parsed(plan: Plan) -> ET.Element:
    return ET.fromstring(timeline.svg(plan))


def rects(root: ET.Element, kind: str) -> list[ET.Element]:
    return [r for r in root.iter(f"{SVG}rect") if kind in r.get("class", "").split()]


def span(rect: ET.Element) -> tuple[float, float]:
    x = float(rect.get("x", "nan"))
    return x, x + float(rect.get("width", "nan"))


def actions(plan: Plan) -> list[str]:
    return [str(a) for _, step in timeline.steps_of(plan) for rank in step.schedule.ranks for a in rank]


def pieces(plan: Plan) -> int:
    return sum(len(pieces) for _, step in timeline.steps_of(plan) for pieces in step.filling.pieces)


# -- SVG ----------------------------------------------------------------------------------------------------------------


def test_each_action_is_one_box(plan: Plan) -> None:
    root = parsed(plan)
    titles = [rect.findtext(f"{SVG}title", "").partition(",")[0] for rect in rects(root, "action")]
    assert sorted(titles) == sorted(actions(plan))
    assert len(rects(root, "piece")) == pieces(plan)
    ranks = sum(len(step.schedule.ranks) for _, step in timeline.steps_of(plan))
    assert len(rects(root, "track")) == ranks + len(timeline.steps_of(plan)), "one more in each legend"
    tasks = [t for _, step in timeline.steps_of(plan) for t in step.timeline.tasks]
    assert len([r for r in rects(root, "send") if "box" in r.get("class", "")]) == sum(" to " in t.stream for t in tasks)
    assert len([r for r in rects(root, "sum") if "box" in r.get("class", "")]) == sum("sums" in t.stream for t in tasks)


def test_boxes_are_where_their_seconds_are() -> None:
    plan = PLANS["1f1b"]
    root, step = parsed(plan), plan.step
    scale = timeline.WIDTH[0] / step.seconds
    for task, at in zip(step.timeline.tasks, step.timeline.spans, strict=True):
        same = [r for r in rects(root, "box") if r.findtext(f"{SVG}title", "").startswith(f"{task.name}, {task.stream}:")]
        assert len(same) == 1
        left, right = span(same[0])
        assert left == pytest.approx(timeline.LEFT + at.start * scale, abs=0.02)
        assert right == pytest.approx(timeline.LEFT + at.end * scale, abs=0.03)


def test_what_a_rank_computes_does_not_overlap_and_is_within_its_track(plan: Plan) -> None:
    root = parsed(plan)
    rows: dict[str, list[ET.Element]] = {}
    tracks = {t.get("y", ""): t for t in rects(root, "track") if "key" not in t.get("class", "")}
    for rect in [*rects(root, "action"), *rects(root, "piece")]:
        y = max((y for y in tracks if float(y) <= float(rect.get("y", "nan"))), key=float)
        bottom = float(rect.get("y", "nan")) + float(rect.get("height", "nan"))
        assert bottom <= float(y) + timeline.ROW + 1e-6
        rows.setdefault(y, []).append(rect)
    assert rows.keys() == tracks.keys()
    for y, row in rows.items():
        spans = sorted(map(span, row))
        assert all(b[0] >= a[1] - 0.03 for a, b in itertools.pairwise(spans))
        left, right = span(tracks[y])
        assert spans[0][0] >= left - 0.01 and spans[-1][1] <= right + 0.03


def test_everything_is_within_the_picture(plan: Plan) -> None:
    root = parsed(plan)
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", "0")), float(rect.get("y", "0"))
        assert x >= 0 and x + float(rect.get("width", "nan")) <= width
        assert y >= 0 and y + float(rect.get("height", "nan")) <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 < float(text.get("x", "nan")) < width and 0 < float(text.get("y", "nan")) < height


def test_boxes_tell_their_micro_batch_where_there_is_room() -> None:
    wide = [t.text for t in parsed(PLANS["1f1b"]).iter(f"{SVG}text") if (t.get("class") or "").startswith("on B")]
    assert sorted(filter(None, wide)) == list("00112233")
    many = parsed(made(microbatches=128, stages=4, frozen=False))
    shown = [t for t in many.iter(f"{SVG}text") if (t.get("class") or "").startswith("on ")]
    assert 0 < len(shown) < len(rects(many, "action")) == 4 * 128 * 2
    assert timeline.WIDTH[0] < float(many.get("width", "nan")) <= timeline.LEFT + timeline.WIDTH[1] + timeline.RIGHT


def test_the_title_and_the_legend() -> None:
    plan = PLANS["1f1b"]
    texts = [t.text for t in parsed(plan).iter(f"{SVG}text")]
    assert texts[0] == str(plan)
    assert texts[1] is not None and texts[1].startswith("step ")
    assert f"bubbles {100 * plan.bubble_share:.1f} % ({100 * plan.unfilled_share:.1f} % without" in texts[1]
    assert {"forward", "backward", "frozen layers, next batch", "sends", "sum of gradients", "idle"} <= set(texts)
    assert "backward, weights (W)" not in texts, "only what occurs is explained"
    assert "backward, weights (W)" in [t.text for t in parsed(PLANS["zero-bubble"]).iter(f"{SVG}text")]
    assert "rank 1 (2 devices)" in [(t.text or "") for t in parsed(plan).iter(f"{SVG}text")]
    assert "without frozen" not in timeline.svg(PLANS["gpipe"])


def test_self_conditioned_steps_are_drawn_at_the_same_scale() -> None:
    plan = PLANS["self-conditioned"]
    assert plan.conditioned is not None
    root = parsed(plan)
    plain, conditioned = [[r for r in rects(root, "track") if "key" not in r.get("class", "")][i] for i in (0, -1)]
    ratio = float(plain.get("width", "nan")) / float(conditioned.get("width", "nan"))
    assert ratio == pytest.approx(plan.step.seconds / plan.conditioned.seconds, abs=1e-3)
    assert len([r for r in rects(root, "C") if "box" in r.get("class", "")]) == 2 * 4


def test_the_second_backbone_and_the_end_of_the_step_are_marked() -> None:
    both = parsed(PLANS["two backbones"])
    heights = {r.get("height") for r in rects(both, "action")}
    assert len(heights) == 2 and "low boxes: second backbone" in timeline.svg(PLANS["two backbones"])
    behind = parsed(PLANS["unfilled"])
    assert len([line for line in behind.iter(f"{SVG}line") if line.get("class") == "end"]) == 2, "in the legend and at it"
    assert "runs behind the step" not in timeline.svg(PLANS["gpipe"])


def test_weight_gradients_that_were_measured_to_take_longer_than_the_backward_take_all_of_it() -> None:
    chain = tuple(replace(layer, weight=curve(9)) for layer in BACKBONE)
    problem = Problem(replace(profile(frozen=False), chains=(chain,)), 2, 2, 4, 8)
    root = parsed(planned(problem, equal_layers(problem), "zero-bubble"))
    assert {float(r.get("width", "nan")) for r in rects(root, "I") if "box" in r.get("class", "")} == {0.0}
    assert all(float(r.get("width", "nan")) > 0 for r in rects(root, "W"))


def test_names_of_layers_are_escaped() -> None:
    plan = PLANS["1f1b"]
    frozen = tuple(replace(layer, name=f'<{layer.name}> & "co"') for layer in plan.problem.profile.frozen)
    odd = replace(plan, problem=replace(plan.problem, profile=replace(plan.problem.profile, frozen=frozen)))
    root = parsed(odd)
    assert any('<image> & "co"' in r.findtext(f"{SVG}title", "") for r in rects(root, "piece"))
    assert "<image>" not in timeline.page(odd)


def test_kinds_have_colours_of_their_own_in_both_modes() -> None:
    colours = {k: re.findall(rf"\.{k} {{ fill: (#\w+)", timeline.STYLE) for k in timeline.KINDS}
    assert all(colours.values())
    assert len({found[0] for found in colours.values()}) == len(colours)
    assert "prefers-color-scheme: dark" in timeline.STYLE


@pytest.mark.parametrize("end", [1e-6, 0.00037, 0.1, 1.0, 2.6, 9.99, 1234.5])
def test_ticks_are_round_and_few(end: float) -> None:
    found = timeline.ticks(end, 10)
    assert 3 <= len(found) <= 10 and found[0] == 0 and found[-1] <= end * (1 + 1e-9)
    assert f"{found[1]:e}"[0] in "125" and float(f"{found[1]:.0e}") == pytest.approx(found[1])
    assert timeline.ticks(0, 10) == [0.0]


# -- Chrome trace -------------------------------------------------------------------------------------------------------


def test_a_trace_has_all_that_happens(plan: Plan, tmp_path: Path) -> None:
    write_trace(tmp_path / "plan.json", timeline.trace(plan))
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    steps = timeline.steps_of(plan)
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [name for name, _ in steps]
    happens = [e for e in events if e["ph"] == "X"]
    assert len(happens) == sum(len(step.timeline.tasks) for _, step in steps) + pieces(plan)
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert all((e["pid"], e["tid"]) in threads for e in happens)
    for process, (_, step) in enumerate(steps):
        mine = [e for e in happens if e["pid"] == process]
        assert max(e["ts"] + e["dur"] for e in mine) == pytest.approx(1e6 * step.seconds)
        for rank, found in enumerate(step.filling.pieces):
            there = [e for e in mine if threads[process, e["tid"]] == f"rank {rank}" and "bubble" in e.get("args", {})]
            names = [plan.problem.profile.frozen[piece.layer].name for piece in found]
            assert [e["name"] for e in there] == names
            assert [e["ts"] for e in there] == pytest.approx([1e6 * piece.start for piece in found])


def test_ranks_are_the_first_threads_of_a_trace() -> None:
    events = timeline.trace(PLANS["two backbones"])
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert [names[tid] for tid in sorted(order, key=order.__getitem__)] == [
        "rank 0", "rank 1", "0 to 1", "1 to 0", "sums 0", "sums 1",
    ]  # fmt: skip


# -- HTML ---------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Texts of table cells, and every address that the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag in ("td", "th")
        if self.inside:
            self.cells.append("")
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")


def test_a_page_holds_the_picture_and_the_tables(plan: Plan) -> None:
    text = timeline.page(plan)
    page = Page(text)
    assert page.addresses == [] and "url(" not in text and "@import" not in text and "<script" not in text
    assert timeline.svg(plan) in text
    assert {str(plan), "plain data parallelism"} <= set(page.cells)
    assert len([c for c in page.cells if c.endswith("iB")]) == len(plan.costs), "memory of each stage"
    assert ("of their time is in bubbles" in text) == bool(plan.problem.profile.frozen)


def test_pictures_are_written_by_the_name_of_the_file(tmp_path: Path) -> None:
    plan = PLANS["1f1b"]
    timeline.write(plan, tmp_path / "plan.svg")
    timeline.write(plan, tmp_path / "plan.html")
    assert (tmp_path / "plan.svg").read_text() == timeline.svg(plan)
    assert (tmp_path / "plan.html").read_text() == timeline.page(plan)


def test_pictures_are_the_same_each_time() -> None:
    assert timeline.svg(made("zero-bubble")) == timeline.svg(made("zero-bubble"))
