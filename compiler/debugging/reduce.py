"""Reduction: a small graph and small inputs with the same failure as a large one.

Every candidate is a part of the graph whose inputs hold the values that they really had, with references computed anew. A
failure of the passes is judged by interpretation alone, so kernels are only built where code generation is at fault.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ...errors import AnotherFailure, InvalidGraph, NothingToFind, PlaitError
from ...ir import Graph, Node, Value, verify
from ...passes.base import Step
from ..decisions import Decisions
from ..pipelines import Session, passes
from .compare import Wrong
from .cut import Recorded, cone
from .failure import Failure, of_error
from .first_bad import BadNode, first_bad_node
from .interpret import interpret
from .shrink import shrunk
from .subject import Build, Subject, failure_apart
from .walk import Walk

AROUND = 2
"""How many nodes away from the first bad one are tried as the whole program."""


@dataclass(frozen=True)
class Reduced:
    """A small program with the failure of a large one: `before` is how many nodes that had, `tried` how many candidates
    were judged. `left` says why it is not smaller, "" where nothing more can be taken away."""

    subject: Subject
    failure: Failure
    before: int
    tried: int
    seconds: float
    left: str = ""

    @property
    def nodes(self) -> int:
        """How many nodes are left."""
        return len(self.subject.graph.nodes)

    def __str__(self) -> str:
        left = f"; {self.left}" if self.left else ""
        head = f"{self.before} -> {self.nodes} nodes, {self.tried} candidates in {self.seconds:.1f} s{left}"
        return f"{head}\n  {self.failure}\n\n{self.subject.graph}"


def reduce(subject: Subject, failure: Failure | None = None, *, seconds: float = 60) -> Reduced:
    """Shrink a failing subject while the same failure persists; size symbols stay symbols.

    `failure` is what it fails with, by default found out. The result may be a graph of a later level than the subject's,
    where the failure is there too. After `seconds` the smallest program so far is returned. Raises NothingToFind for a
    subject that does not fail, AnotherFailure for one that fails otherwise.
    """
    judge = _Judge(subject, seconds)
    found, build = judge.first(failure)
    bad = _first_bad(subject, build) if found.kind == "wrong" and build is not None else None
    judge.expect(found, bad)
    best = subject
    for later in _later(subject, bad):
        if judge(later):
            best = later
            break
    search = _Search(judge, best, found)
    if bad is not None:
        search.around(bad, build)
    search.run()
    if bad is not None and judge.op and not judge.strict and _op(search.best) != judge.op:
        judge.strict = True  # it has become another failure on the way: look at each candidate's op
        search = _Search(judge, best, found)
        search.run()
    left = "" if judge.time_left else f"the {seconds:g} seconds are over"
    return Reduced(search.best, search.failure, len(subject.graph.nodes), judge.tried, judge.spent, left)


# -- judging ------------------------------------------------------------------------------------------------------------


@dataclass
class _Judge:
    """Whether candidates fail as the subject does. `at` says how far one must go to see it: to run the passes and to
    interpret what they make ("passes"), only to run them ("raises"), to compile and run it ("kernels"), or to do so in a
    process of its own ("crashes")."""

    subject: Subject
    seconds: float
    start: float = field(default_factory=time.perf_counter)
    at: str = "kernels"
    signatures: tuple[Failure, ...] = ()
    op: str = ""
    strict: bool = False
    tried: int = 0
    found: Failure | None = None

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    @property
    def time_left(self) -> bool:
        return self.spent < self.seconds

    def first(self, failure: Failure | None) -> tuple[Failure, Build | None]:
        """The failure of the subject itself, and its build where there is one."""
        build: Build | None = None
        found: Failure | None = None
        if failure is not None and failure.kind == "crashes":
            self.at = "crashes"
            return self._checked(failure_apart(self.subject), failure), None
        try:
            graph, steps = self.subject.transform(Decisions())
        except Exception as error:  # the failure that is looked for
            self.at, found = "raises", of_error(error)
        else:
            self.at = "passes"
            found = self._interpreted(graph, self.subject, steps)
        if found is None or not (failure is None or failure.same(found)):
            self.at = "kernels"
            try:
                build = self.subject.build()
                found = self.subject.judge(self.subject.run(build), build.history)
            except Exception as error:  # the failure that is looked for
                found = of_error(error)
        elif self.at == "passes":
            build = self.subject.build()
        return self._checked(found, failure), build

    def _checked(self, found: Failure | None, failure: Failure | None) -> Failure:
        self.tried += 1
        if found is None:
            raise NothingToFind(name=self.subject.name)
        if failure is not None and not failure.same(found):
            raise AnotherFailure(name=self.subject.name, found=found, expected=failure)
        return replace(found, op=failure.op if failure is not None else found.op)

    def expect(self, found: Failure, bad: BadNode | None) -> None:
        """Look for this failure. A wrong value may be as wrong as in the results, or as where it begins, or in between."""
        self.signatures = (found,)
        if bad is None:
            return
        # what overwrites a value, and not the value that it hits, is at fault
        self.op = found.op or ("" if bad.stage == "memory" else bad.node.op.name)
        low, high = sorted((found.band, bad.wrong.band if isinstance(bad.wrong, Wrong) else found.band))
        self.signatures = tuple(replace(found, op=self.op, band=band) for band in range(low, high + 1))

    def __call__(self, candidate: Subject | None) -> bool:
        """Whether a candidate is a valid program with the same failure, which `found` then is."""
        if candidate is None or not self.time_left:
            return False
        self.tried += 1
        self.found = self._look(candidate)
        if not any(s.same(self.found) for s in self.signatures):
            return False
        return not self.strict or _op(candidate) == self.op

    def _look(self, candidate: Subject) -> Failure | None:
        try:
            verify(candidate.graph)
            _ = candidate.eager, candidate.exact
        except (InvalidGraph, PlaitError, RuntimeError, IndexError, TypeError, ValueError):
            return None  # no program, or none that runs on these inputs
        if self.at in ("kernels", "crashes"):
            return candidate.failure() if self.at == "kernels" else failure_apart(candidate)
        try:
            graph, steps = candidate.transform(Decisions())
        except Exception as error:  # a failure, this one or another
            return of_error(error) if self.at == "raises" else None
        return self._interpreted(graph, candidate, steps) if self.at == "passes" else None

    @staticmethod
    def _interpreted(graph: Graph, subject: Subject, steps: Sequence[Step]) -> Failure | None:
        try:
            return subject.judge(interpret(graph, subject.inputs), steps)
        except (PlaitError, RuntimeError, IndexError, TypeError, ValueError):
            return None  # it shows when it is compiled


def _first_bad(subject: Subject, build: Build) -> BadNode | None:
    try:
        return first_bad_node(subject, build)
    except (PlaitError, RuntimeError):
        return None  # no single node is: the search does without


def _op(subject: Subject) -> str:
    """The op of the first bad node, "" where there is none."""
    try:
        return first_bad_node(subject).node.op.name
    except (PlaitError, RuntimeError):
        return ""


# -- where to start -----------------------------------------------------------------------------------------------------


def _later(subject: Subject, bad: BadNode | None) -> Iterator[Subject]:
    """The subject at later moments of its compilation, the last one first: after all passes, before the pass at fault, and
    where what is compiled begins."""
    session = Session(subject.name, replace(subject.options, verify="structure"), reports=False)
    walk = Walk(subject.graph, subject.level, subject.inputs, session)
    split = len(passes("split", subject.options))
    moments: list[Subject] = []
    names: list[str] = []

    def note() -> None:
        level = subject.level if len(walk.ahead) > split else "split"
        moments.append(replace(subject, graph=walk.graph, level=level))

    note()
    try:
        while not walk.done:
            names.append(walk.ahead[0])
            walk.step()
            note()
    except Exception:  # the pass that raises is the one to look at: its graph is the last moment
        pass
    chosen = [len(moments) - 1]
    if bad is not None and bad.stage in names:
        chosen.append(names.index(bad.stage))
    chosen += [i for i, m in enumerate(moments) if m.level == "split"][:1]
    for i in dict.fromkeys(chosen):
        if moments[i].graph is not subject.graph:
            yield moments[i]


# -- the search ---------------------------------------------------------------------------------------------------------


@dataclass
class _Search:
    """Delta debugging over nodes, results and sizes; `best` is the smallest program so far."""

    judge: _Judge
    best: Subject
    failure: Failure

    def take(self, candidate: Subject | None) -> bool:
        """Judge a candidate and go on from it where it fails the same way."""
        if candidate is None or not self.judge(candidate) or self.judge.found is None:
            return False
        self.best, self.failure = candidate, self.judge.found
        return True

    def run(self) -> None:
        """Take away all that can be taken away."""
        self.narrow()
        recorded = Recorded.of(self.best)
        rest = [n for n in self.best.graph.nodes if n.op.name != "plait.constant"]
        if len(rest) < len(self.best.graph.nodes):
            self.take(recorded.part(rest))
        self.nodes()
        self.results()
        self.sizes()

    def around(self, bad: BadNode, build: Build | None) -> None:
        """Try the nodes around the first bad one, a few at a time; all while it is needed, where it was overwritten."""
        graph = self.best.graph
        near = _origin(self.best, bad, build)
        if bad.stage == "memory" and near:
            readers = [n for m in near for v in m.outputs for n in graph.users.get(v, ())]
            places = [i for i, n in enumerate(graph.nodes) if n in near or n in readers]
            near = set(graph.nodes[places[0] : places[-1] + 1])
        for _ in range(AROUND + 1):
            if near and len(near) < len(graph.nodes) and self.take(Recorded.of(self.best).part(near)):
                return
            values = {v for n in near for v in (*n.inputs, *n.outputs)}
            near |= {n for v in values for n in (*graph.users.get(v, ()), *filter(None, (graph.producers.get(v),)))}

    def narrow(self) -> None:
        """Keep the result that is wrong only, and what it needs."""
        if self.failure.kind != "wrong" or not self.failure.what.startswith("result "):
            return
        graph, worst = self.best.graph, int(self.failure.what.removeprefix("result "))
        results = [*graph.outputs, *(v for _, v in graph.writes)]
        value = results[worst] if worst < len(results) else None
        if isinstance(value, Value) and value in graph.producers:
            nodes = cone(graph, [value])
            if len(nodes) < len(graph.nodes) or len(results) > 1:
                self.take(Recorded.of(self.best).part(nodes, [value]))

    def nodes(self) -> None:
        """Delta debugging: halves alone, then what is left without each of them, then quarters, down to single nodes."""
        pieces = 2
        while len(self.best.graph.nodes) > 1 and self.judge.time_left:
            recorded, nodes = Recorded.of(self.best), self.best.graph.nodes
            chunks = _chunks(nodes, pieces)
            if any(self.take(recorded.part(c)) for c in chunks):
                pieces = 2
                self.narrow()
            elif pieces > 2 and any(self.take(recorded.part(_without(nodes, c))) for c in chunks):
                pieces = max(pieces - 1, 2)
                self.narrow()
            elif pieces >= len(nodes):
                return
            else:
                pieces = min(2 * pieces, len(nodes))

    def results(self) -> None:
        """Give back one result only, whichever shows the failure."""
        graph = self.best.graph
        values = [v for v in (*graph.outputs, *(v for _, v in graph.writes)) if isinstance(v, Value)]
        if len(values) > 1:
            recorded = Recorded.of(self.best)
            _ = any(self.take(recorded.part(cone(graph, [v]), [v])) for v in dict.fromkeys(values))

    def sizes(self) -> None:
        """Make sizes smaller, static ones and what symbols stand for, for as long as something changes."""
        again = True
        while again and self.judge.time_left:
            again = False
            for candidate in shrunk(self.best):
                if self.take(candidate):
                    again = True
                    break


def _chunks(nodes: Sequence[Node], count: int) -> list[set[Node]]:
    edges = [len(nodes) * i // count for i in range(count + 1)]
    return [set(nodes[a:b]) for a, b in pairwise(edges) if a < b]


def _without(nodes: Sequence[Node], chunk: set[Node]) -> set[Node]:
    return {n for n in nodes if n not in chunk}


def _origin(subject: Subject, bad: BadNode, build: Build | None) -> set[Node]:
    """The nodes of a subject's graph that the first bad node is, or was made from: by identity, by what passes put in their
    place, else by the line that they come from."""
    graph, wanted = subject.graph, set(bad.node.outputs)
    known = {v for n in graph.nodes for v in n.outputs}
    found = {graph.producers[v] for v in wanted & known}
    for step in build.history if build is not None and not found else ():
        for old in step.replaced:
            if old in known and step.became(old) in wanted:
                found.add(graph.producers[old])
    if found or not bad.node.loc.stack:
        return found
    here = (bad.node.loc.stack, bad.node.loc.module)
    return {n for n in graph.nodes if (n.loc.stack, n.loc.module) == here}
