"""Passes as objects: declared options, pipelines with history, verification, named failures."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from plait.errors import (
    BadPassOption,
    InvalidGraph,
    MissingFact,
    MissingPassOption,
    PassFailed,
    UnknownPass,
    UnknownPassOption,
    WrongCapturePoint,
)
from plait.ir import Graph, Rule, parse_graph, pattern
from plait.passes import (
    PASSES,
    Context,
    Pass,
    approximate,
    describe,
    exact,
    make,
    option,
    parse,
    register,
    run_pipeline,
    summary,
)
from plait.passes.base import Numerics
from plait.passes.prune import Prune
from plait.passes.simplify import Simplify

TEXT = """
def f(x: "f32[4]"):
    a = aten.sin.default(x)
    b = aten.neg.default(a)
    c = aten.neg.default(b)
    d = aten.exp.default(c)
    return (d,)
"""


@dataclass(frozen=True)
class Sample(Pass):
    """Sample pass for these tests.

    before:  a = x
    after:   a = x
    """

    name: ClassVar[str] = "sample"
    requires: ClassVar[frozenset[str]] = frozenset({"calm"})
    bound: float = option(doc="largest error")
    mode: Literal["fast", "exact"] = option("fast", doc="how")
    limit: int | None = option(None, doc="how many")
    layers: tuple[str, ...] = option((), doc="which layers")
    loud: bool = option(False, doc="say it")

    def numerics(self) -> Numerics:
        return approximate(self.bound)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return graph


@pytest.fixture
def sample():
    register(Sample)
    yield
    del PASSES["sample"]


@dataclass(frozen=True)
class Broken(Pass):
    """Raises, or breaks the graph.

    before:  anything
    after:   nothing
    """

    name: ClassVar[str] = "broken"
    how: str = "raise"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if self.how == "raise":
            raise ValueError("no such thing")
        if self.how == "rule":
            return ctx.rewrite(
                graph, [Rule("bad", pattern("aten.exp.default"), lambda m, b: b.call("aten.exp.default", 1, 2))]
            )
        return graph.replace(nodes=graph.nodes[1:])


def test_one_declaration_gives_options_and_docs(sample: None):
    infos = describe(Sample)
    assert [(i.name, i.type, i.doc) for i in infos] == [
        ("bound", "float", "largest error"),
        ("mode", '"fast" or "exact"', "how"),
        ("limit", "int or none", "how many"),
        ("layers", "list of str", "which layers"),
        ("loud", "bool", "say it"),
    ]
    assert [i.required for i in infos] == [True, False, False, False, False]
    assert summary(Sample) == "Sample pass for these tests."


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sample:bound=1e-3", {"bound": 1e-3, "mode": "fast", "limit": None, "layers": (), "loud": False}),
        ("sample:bound=1,mode=exact,limit=3", {"bound": 1.0, "mode": "exact", "limit": 3, "layers": (), "loud": False}),
        ("sample:bound=1,limit=none,layers=a+b,loud", {"bound": 1.0, "mode": "fast", "limit": None, "layers": ("a", "b"),
                                                       "loud": True}),
    ],
)  # fmt: skip
def test_parse_reads_what_str_writes(sample: None, text: str, options: dict[str, object]):
    one = parse(text)
    assert one.options() == options
    assert parse(str(one)) == one


def test_errors_about_options(sample: None):
    with pytest.raises(UnknownPass, match="near names: simplify"):
        make("simplfy")
    with pytest.raises(UnknownPassOption, match="it has: bound, mode, limit, layers, loud"):
        make("sample", bond=1)
    with pytest.raises(MissingPassOption, match=r"needs the option 'bound' \(float\): largest error"):
        make("sample")
    for value in ("low", True, None):
        with pytest.raises(BadPassOption, match="must be float"):
            make("sample", bound=value)
    with pytest.raises(BadPassOption, match='must be "fast" or "exact"'):
        make("sample", bound=1.0, mode="quick")
    with pytest.raises(BadPassOption, match="must be int or none"):
        make("sample", bound=1.0, limit=2.5)
    with pytest.raises(BadPassOption, match="must be bool"):
        make("sample", bound=1.0, loud="perhaps")


def test_names_are_kebab_case_and_unique():
    with pytest.raises(ValueError, match="kebab-case"):
        register(type("Odd", (Pass,), {"name": "Odd_Name"}))
    with pytest.raises(ValueError, match="two passes called 'prune'"):
        register(type("Twin", (Pass,), {"name": "prune"}))


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_says_what_it_does(name: str):
    cls = PASSES[name]
    doc = cls.__doc__ or ""
    assert "before:" in doc and "after:" in doc
    assert all(i.doc for i in describe(cls)), "every option has a line of docs"
    if all(not i.required for i in describe(cls)):
        one = make(name)
        assert parse(str(one)) == one
        assert one.numerics().kind in ("exact", "reassociates", "approximate")


def test_history_of_a_pipeline():
    seen: list[str] = []
    start = parse_graph(TEXT)
    end, steps = run_pipeline(
        start, [Simplify(), Prune()], Context(at="split"), verify="each-pass", on_step=lambda s: seen.append(s.pass_name)
    )
    assert seen == ["simplify", "prune"] == [s.pass_name for s in steps]
    assert steps[0].before is start and steps[0].after is steps[1].before and steps[1].after is end
    assert steps[0].fired == {"neg-neg": 1} and steps[1].fired == {"dead-node": 1}
    assert steps[0].changed and steps[0].numerics == exact() and steps[0].seconds > 0
    assert [n.op.name for n in end.nodes] == ["aten.sin.default", "aten.exp.default"]
    assert end.nodes[-1].loc.rules == ()


def test_bisection_stops_firings():
    asked: list[tuple[str, str]] = []

    def never(name: str, rule: str, node: Any) -> bool:
        asked.append((name, rule))
        return False

    _, steps = run_pipeline(parse_graph(TEXT), [Simplify(), Prune()], Context(at="split", allow=never))
    assert not any(s.changed for s in steps)
    assert asked == [("simplify", "neg-neg"), ("prune", "dead-node")]


def test_facts(sample: None):
    start = parse_graph(TEXT)
    with pytest.raises(MissingFact, match="requires 'calm', which does not hold here"):
        run_pipeline(start, [Sample(bound=1.0)], Context())
    run_pipeline(start, [Sample(bound=1.0)], Context(), facts={"calm"})
    with pytest.raises(MissingFact):  # simplify changes the graph and does not say that it keeps calm
        run_pipeline(start, [Simplify(), Sample(bound=1.0)], Context(), facts={"calm"})


def test_capture_points():
    @dataclass(frozen=True)
    class Early(Prune):
        name: ClassVar[str] = "early"
        at = "forward"

    with pytest.raises(WrongCapturePoint, match="works on forward graphs, this one is a split graph"):
        run_pipeline(parse_graph(TEXT), [Early()], Context(at="split"))
    run_pipeline(parse_graph(TEXT), [Early()], Context(at="forward"))


def test_a_pass_that_raises_is_named_with_the_graph_it_was_given():
    with pytest.raises(PassFailed, match=r"pass broken failed: ValueError: no such thing") as caught:
        run_pipeline(parse_graph(TEXT), [Broken()], Context())
    assert "aten.sin.default" in str(caught.value.fields["before"])
    assert parse_graph(str(caught.value.fields["before"]))


def test_a_rule_that_raises_is_named_with_its_node():
    with pytest.raises(PassFailed, match=r"rule bad failed: TypeError") as caught:
        run_pipeline(parse_graph(TEXT), [Broken("rule")], Context())
    assert "--> d = aten.exp.default(c)" in str(caught.value)
    assert "    a = aten.sin.default(x)" in str(caught.value)


@pytest.mark.parametrize("verify", ["each-pass", "structure"])
def test_a_pass_that_breaks_the_graph_is_named(verify: Literal["each-pass", "structure"]):
    with pytest.raises(PassFailed, match="pass broken failed: it left an invalid graph") as caught:
        run_pipeline(parse_graph(TEXT), [Simplify(), Broken("break"), Prune()], Context(), verify=verify)
    assert "is used before it is defined" in str(caught.value)
    assert "aten.sin.default" in str(caught.value.fields["before"])


def test_a_graph_that_comes_in_broken_is_not_blamed_on_a_pass():
    broken = Broken("break").run(parse_graph(TEXT), Context())
    with pytest.raises(InvalidGraph):
        run_pipeline(broken, [Prune()], Context(), verify="each-pass")
    with pytest.raises(InvalidGraph):
        run_pipeline(broken, [], Context(), verify="structure")
