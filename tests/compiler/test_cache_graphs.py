"""Compiled graphs in the disk cache: what changes their key, and that what comes back is what was stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from plait.codegen.cache import Cache
from plait.codegen.compile import compile_graph
from plait.compiler.cache import Stored, code_hash, constants_hash, find, graph_key, store
from plait.ir import Graph, parse_graph

TEXT = """
graph(level="tensor", symbols={"s0": (2, None, 8)})
def forward(x: "f32[s0,4]"):
    w = plait.constant("w")
    add = aten.add.Tensor(x, w)
    sort, order = aten.sort.default(add)
    return (sort, order, s0)
"""


@dataclass(frozen=True)
class Choice:
    generate: bool = True


def graph(scale: float = 1.0, text: str = TEXT) -> Graph:
    return parse_graph(text, {"w": torch.arange(4.0) * scale})


def test_a_compiled_graph_comes_back_whole(tmp_path: Path) -> None:
    compiled = compile_graph(graph())
    cache, key = Cache(tmp_path), graph_key(graph(), Choice())
    assert find(cache, key) is None
    store(cache, key, Stored(compiled.plan, compiled.sources, compiled.coverage))
    found = find(Cache(tmp_path), graph_key(graph(), Choice()))
    assert found == Stored(compiled.plan, compiled.sources, compiled.coverage)


def test_what_changes_the_key() -> None:
    base = graph_key(graph(), Choice())
    others = {
        "constants": graph_key(graph(2.0), Choice()),
        "graph": graph_key(graph(text=TEXT.replace("aten.add", "aten.sub")), Choice()),
        "options": graph_key(graph(), Choice(generate=False)),
        "target": graph_key(graph(), Choice(), target="cuda:90"),
    }
    assert {name: key.differs(base) for name, key in others.items()} == {name: (name,) for name in others}


def test_constants_are_hashed_by_content_and_layout() -> None:
    w = torch.arange(6.0)
    same = constants_hash({"a": w, "b": w[2:]})
    assert constants_hash({"b": w.clone()[2:], "a": w.clone()}) == same
    different = [{"a": w, "b": w[3:]}, {"a": w.to(torch.bfloat16), "b": w[2:]}, {"a": w.view(2, 3), "b": w[2:]}, {"a": w}]
    assert len({constants_hash(d) for d in different} | {same}) == len(different) + 1


def test_the_code_of_plait_is_part_of_the_key() -> None:
    assert dict(graph_key(graph(), Choice()).parts)["code"] == code_hash() and len(code_hash()) == 64


def test_a_plan_of_another_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, key = Cache(tmp_path), graph_key(graph(), Choice())
    cache.put(key, {"plan.json": b'{"version": 999}', "sources.json": b"{}", "coverage.json": b"{}"})
    assert find(cache, key) is None
    assert "P0522" in caplog.text
