"""The right one is blamed: replacements by values that were there, passes that raise, approximations, damage passed on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plait
import pytest
import torch
from click.testing import CliRunner
from plait import errors
from plait.compiler.cli import main
from plait.compiler.debugging.ledger import ledger_table
from plait.ir import Builder, Graph, Rule, Such, Var, pattern
from plait.ir.rewrite import Match
from plait.passes import registry
from plait.passes.base import Context, Numerics, Pass, approximate, map_regions
from torch import nn

X = torch.linspace(-2, 2, 12).view(3, 4)
NAN = float("nan")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAIT_DEBUG_DIR", str(tmp_path / "failures"))
    return tmp_path


class Residual(nn.Module):
    """A residual that is normalised, and counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) + torch.tanh(x)
        return torch.relu(self.norm(x)) * 2.0


@dataclass(frozen=True)
class Bad(Pass):
    """Does what `how` says."""

    name: ClassVar[str] = "bad"
    at: ClassVar[Any] = "split"
    how: str = "drops"

    def numerics(self) -> Numerics:
        return approximate(1e-2) if self.how == "approximates" else super().numerics()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def approximated(m: Match, b: Builder) -> Any:
            return b.call("aten.mul.Tensor", m["x"], 2.002)

        def fails(m: Match, b: Builder) -> Any:
            raise ZeroDivisionError("in a rule")

        if self.how == "raises":
            raise KeyError("mine")
        if self.how == "returns nothing":
            return None  # type: ignore[return-value]
        if self.how == "breaks":
            return graph.replace(nodes=(*graph.nodes[:-2], graph.nodes[-1]))
        two = Such("two", lambda m, a: a == 2.0)
        rules = {
            "drops": Rule("drop", pattern("aten.add.Tensor", Var("x"), Var("y")), lambda m, b: m["y"]),
            "approximates": Rule("near", pattern("aten.mul.Tensor", Var("x"), two), approximated),
            "fails": Rule("fails", pattern("aten.relu.default", Var("x")), fails),
            "turns": Rule("turn", pattern("aten.relu.default", Var("x")), lambda m, b: b.call("aten.abs.default", m["x"])),
        }
        rule = rules[self.how]
        return map_regions(ctx.rewrite(graph, [rule]), lambda region: ctx.rewrite(region, [rule]))


@dataclass(frozen=True)
class Other(Bad):
    name: ClassVar[str] = "other"


@pytest.fixture
def model() -> nn.Module:
    return Residual().eval()


# -- values that were there already ---------------------------------------------------------------------------------------


def test_a_value_put_in_the_place_of_another_is_blamed_on_its_rule(model: nn.Module) -> None:
    bad = plait.first_bad_node(model, (X,), passes=[Bad("drops")])
    assert (bad.stage, bad.node.op.name, bad.instead, bad.rules) == ("bad", "aten.add.Tensor", "tanh", ("drop",))
    assert "aten.add.Tensor, which drop replaced by tanh in pass bad" in str(bad)
    assert "x = self.linear(x) + torch.tanh(x)" in str(bad)
    with pytest.raises(errors.NumericsBroken, match="first where rule drop put tanh in the place of add") as caught:
        plait.compile(model, (X,), passes=[Bad("drops")], options={"verify": "each-pass"})
    assert caught.value.source is not None and caught.value.source.startswith("test_blame.py:")


def test_an_input_in_the_place_of_a_value_is_seen() -> None:
    bad = plait.first_bad_node(nn.Sequential(Plus()).eval(), (X,), passes=[Bad("drops")])
    assert (bad.node.op.name, bad.instead) == ("aten.add.Tensor", bad.graph.inputs[0].hint)


class Plus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + x


# -- passes that raise ----------------------------------------------------------------------------------------------------


def test_a_pass_that_raises_is_the_culprit(model: nn.Module) -> None:
    found = plait.bisect(model, (X,), passes=[Bad("raises")])
    assert found.decision is not None and found.decision.stage == "bad"
    assert "KeyError: 'mine'" in str(found)


def test_a_rule_that_raises_is_the_culprit(model: nn.Module) -> None:
    found = plait.bisect(model, (X,), passes=[Bad("fails")])
    assert found.decision is not None and found.decision.node is not None
    assert (found.decision.rule, found.decision.node.op.name) == ("fails", "aten.relu.default")
    assert "ZeroDivisionError" in str(found)


def test_a_pass_that_returns_no_graph_has_failed_and_is_still_ahead(model: nn.Module) -> None:
    dbg = plait.debug(model, (X,), passes=[Bad("returns nothing")])
    with pytest.raises(errors.PassFailed, match="it returned NoneType, not a Graph"):
        dbg.until("bad")
    assert dbg.next == "bad" and dbg.run().shape == (3, 4)


@pytest.mark.parametrize("verify", ["off", "structure"])
def test_a_graph_that_a_pass_broke_is_not_blamed_on_the_next_one(model: nn.Module, verify: str) -> None:
    with pytest.raises(errors.PassFailed, match="pass bad failed: it left an invalid graph"):
        plait.compile(model, (X,), passes=[Bad("breaks")], options={"verify": verify})


# -- approximations and numbers that cannot be compared -------------------------------------------------------------------


def test_an_error_that_was_declared_hides_none_that_was_not(model: nn.Module) -> None:
    passes = [Bad("approximates"), Other("turns")]
    found = plait.bisect(model, (X,), passes=passes)
    assert found.decision is not None and (found.decision.stage, found.decision.rule) == ("other", "turn")
    bad = plait.first_bad_node(model, (X,), passes=passes, options={"max_rel_err": 0.1})
    assert (bad.stage, bad.node.op.name) == ("other", "aten.abs.default")
    with pytest.raises(errors.NothingToFind):
        plait.bisect(model, (X,), passes=[Bad("approximates")])


@pytest.mark.parametrize("search", [plait.bisect, plait.first_bad_node])
def test_where_nothing_can_be_compared_nothing_is_called_right(model: nn.Module, search: Callable[..., Any]) -> None:
    with pytest.raises(errors.NotANumber, match="no result holds a finite number"):
        search(model, (torch.full((3, 4), NAN),), passes=[Bad("turns")])


def test_a_budget_that_cannot_be_measured_is_not_spent(model: nn.Module) -> None:
    inputs = (torch.full((3, 4), NAN),)
    compiled = plait.compile(model, inputs, passes=[Bad("approximates")], options={"max_rel_err": 1e-6})
    assert "cannot be measured" in compiled.step("bad").rolled_back


@pytest.mark.parametrize("option", [{"max_rel_err": NAN}, {"max_rel_err": -1}, {"bisect_limit": -5}])
def test_numbers_that_mean_nothing_are_refused(model: nn.Module, option: dict[str, Any]) -> None:
    with pytest.raises(errors.BadOption, match="a number from 0 on"):
        plait.compile(model, (X,), options=option)


def test_the_ledger_names_its_columns(model: nn.Module) -> None:
    head = ledger_table(plait.compile(model, (X,)).numerics()).splitlines()[0]
    assert head.endswith("broken promise")
    with pytest.raises(errors.WrongInputShape, match="dimension 1 of input 'x' must be 4, got 5"):
        plait.compile(model, (X,)).numerics(torch.zeros(3, 5))


# -- edits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.unchecked_graphs("their types are wrong on purpose")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mul = aten.mul.Tensor(relu, 2.0)", "mul = aten.sum.default(relu)"),
        ("mul = aten.mul.Tensor(relu, 2.0)", "mul = aten.gt.Scalar(relu, 2.0)"),
        ("mul = aten.mul.Tensor(relu, 2.0)", "mul = aten.mul.Tensor(p_linear_weight, 2.0)"),
        ("tanh = aten.tanh.default(x)  # f32[3,4]", "tanh = aten.tanh.default(x)  # f32[30,40]"),
        ("aten.addmm.default(p_linear_bias, x, permute)", "aten.addmm.default(p_linear_bias, permute, x)"),
    ],
)
def test_a_type_beside_an_edited_line_is_not_believed(model: nn.Module, old: str, new: str) -> None:
    dbg = plait.debug(model, (X,))
    dbg.until("lower")
    text = str(dbg.graph)
    assert old in text
    with pytest.raises(errors.InvalidGraph, match=r"(gives .* here|cannot be applied)"):
        dbg.edit(text.replace(old, new))
    assert str(dbg.graph) == text


def test_a_deleted_type_is_inferred(model: nn.Module) -> None:
    dbg = plait.debug(model, (X,))
    dbg.until("lower")
    lines = [line.partition("  #")[0] if "aten.tanh" in line else line for line in str(dbg.graph).splitlines()]
    dbg.edit("\n".join(lines).replace("aten.tanh.default", "aten.sigmoid.default"))
    assert "aten.sigmoid.default(x)  # f32[3,4]" in str(dbg.graph)


@pytest.mark.parametrize("edit", [3, lambda graph: None, lambda graph: str(graph)])
def test_what_is_no_graph_is_no_edit(model: nn.Module, edit: Any) -> None:
    with pytest.raises(errors.NoGraph):
        plait.debug(model, (X,)).edit(edit)


# -- regions --------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: torch.relu(x) * 2.0, lambda x: torch.cos(x) + 1.0, (x,))


def test_nodes_inside_branches_are_said_to_be_there() -> None:
    dbg = plait.debug(Branches().eval(), (X,))
    assert "cos = aten.cos.default" in str(dbg.graph) and "<eval_with_key>" not in str(dbg.graph)
    assert str(dbg.graph) == str(plait.debug(Branches().eval(), (X,)).graph)
    assert "torch.cond" in dbg.source("cond_0").code
    with pytest.raises(errors.UnknownNode, match="it is inside a region of cond"):
        dbg.values("cos")


# -- the command line -----------------------------------------------------------------------------------------------------

SOURCES = """
import torch
from dataclasses import dataclass
from typing import Any, ClassVar
from plait.ir import Rule, Var, pattern
from plait.passes.base import Pass

class Net(torch.nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2.0

def net(): return Net(), (torch.ones(2, 3),)

@dataclass(frozen=True)
class Slip(Pass):
    name: ClassVar[str] = "slip"
    at: ClassVar[Any] = "split"
    factor: float = 2.5

    def run(self, graph, ctx):
        def build(m, b):
            return b.call("aten.mul.Tensor", m["x"], self.factor)
        return ctx.rewrite(graph, [Rule("wrong", pattern("aten.mul.Tensor", Var("x"), 2.0), build)])
"""


@pytest.fixture
def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "blamed_sources.py").write_text(SOURCES)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return "blamed_sources:net"


def test_a_pass_of_your_own_goes_by_its_place(source: str) -> None:
    assert registry.parse("blamed_sources:Slip:factor=3").options() == {"factor": 3.0}
    done = CliRunner().invoke(main, ["bisect", source, "--pass", "blamed_sources:Slip"])
    assert done.exit_code == 0 and "slip, rule wrong" in done.output
    with pytest.raises(errors.PassNotFound, match="blamed_sources has no Nothing"):
        registry.parse("blamed_sources:Nothing")


def test_a_broken_check_blames_nobody(source: str) -> None:
    argv = ["bisect", source, "--pass", "blamed_sources:Slip", "--check", f"{sys.executable} nosuchfile.py {{}}"]
    done = CliRunner().invoke(main, argv)
    assert "the check rejects even what is compiled with all" in done.output and "exit code 2" in done.output
    done = CliRunner().invoke(main, [*argv[:-1], "sh -c 'exit 127' {}"])
    assert done.exit_code == 2 and "P0641" in done.output


@pytest.mark.parametrize("path", ["missing/out.zip", "/proc/out.zip"])
@pytest.mark.parametrize("command", ["reduce", "bundle", "compile"])
def test_what_cannot_be_written_is_refused_before_the_work(source: str, command: str, path: str) -> None:
    done = CliRunner().invoke(main, [command, source, "-o", path])
    assert done.exit_code == 2 and "nothing can be written there" in done.output


def test_a_dump_folder_that_cannot_be_written_is_named(model: nn.Module) -> None:
    with pytest.raises(errors.BadOption, match="dump_dir"):
        plait.compile(model, (X,), options={"dump_dir": "/proc/nothing"})


def test_a_pass_to_print_after_must_exist(model: nn.Module) -> None:
    with pytest.raises(errors.UnknownPass, match="nosuch"):
        plait.compile(model, (X,), options={"print_after": "nosuch"})


def test_a_pass_in_a_script_is_told_to_move_into_a_module(source: str, folder: Path) -> None:
    script = SOURCES + "\nimport plait\nplait.compile(*net(), passes=[Slip()], options={'verify': 'each-pass'})\n"
    (folder / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert "to replay it, move pass slip out of the script" in done.stderr and "plait replay" not in done.stderr
