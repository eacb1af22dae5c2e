"""Compile a generated program with a backend, judge it against eager, and shrink what fails."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .builder import prune
from .judge import Verdict, judge
from .program import SCOPE, Program, names_in, rename
from .worlds import REFUSALS, World, reference

Call = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """`kind`: "equal", "close", "wrong" (as the judge says, the worst over all size sets) or "raises"; with the detail."""

    kind: str
    detail: str = ""
    run: int = 0

    @property
    def fine(self) -> bool:
        return self.kind in ("equal", "close")


def check(program: Program, compile: Callable[[Program], Call]) -> Result:
    """Run the compiled program for every size set and compare results and mutated inputs with eager's.

    `compile(program)` returns the compiled function; what it or a call raises is reported as "raises".
    """
    worst = Result("equal")
    try:
        compiled = compile(program)
    except Exception as error:  # a backend may raise anything; it becomes the result
        return Result("raises", f"{type(error).__name__}: {error}")
    for run in range(len(program.sizes)):
        ours, theirs = program.make_inputs(run), program.make_inputs(run)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            expected = program.fn(*theirs)
            try:
                got = compiled(*ours)
            except Exception as error:
                return Result("raises", f"{type(error).__name__}: {error}", run)
        if (shared := _aliasing(got, ours)) != (wanted := _aliasing(expected, theirs)):
            return Result("wrong", f"(result, input) that share memory: {shared}, in eager {wanted}", run)
        verdict = _judged(program, run, [got, ours], [expected, theirs])
        if verdict.kind == "wrong":
            return Result("wrong", verdict.detail, run)
        if verdict.kind == "close":
            worst = Result("close", verdict.detail, run)
    return worst


def _judged(program: Program, run: int, got: object, expected: object) -> Verdict:
    known: list[tuple[Any, list[float]]] = []

    def once() -> tuple[Any, list[float]]:
        if not known:
            known.append(reference(program, run))
        return known[0]

    return judge(got, expected, lambda: once()[0], lambda: once()[1])


def _aliasing(results: tuple, inputs: list[torch.Tensor]) -> list[tuple[int, int]]:
    """Pairs (result, input) that share storage; empty storages excepted, they have no address."""
    where = {t.untyped_storage().data_ptr(): i for i, t in enumerate(inputs) if t.untyped_storage().nbytes()}
    tensors = [(i, r) for i, r in enumerate(results) if isinstance(r, torch.Tensor) and r.untyped_storage().nbytes()]
    return [(i, where[r.untyped_storage().data_ptr()]) for i, r in tensors if r.untyped_storage().data_ptr() in where]


def shrink(program: Program, fails: Callable[[Program], bool], *, budget: int = 200) -> Program:
    """A smaller program for which `fails` still holds: fewer results, fewer statements, operands for what used them.

    `fails` is called at most `budget` times. Programs that eager itself refuses are never proposed.
    """
    calls = 0

    def attempt(candidate: Program) -> bool:
        nonlocal calls
        if calls >= budget or not _runs(candidate):
            return False
        calls += 1
        return fails(candidate)

    changed = True
    while changed and calls < budget:
        changed = False
        for candidate in _smaller(program):
            if attempt(candidate):
                program, changed = candidate, True
                break
    return program


def _smaller(program: Program) -> list[Program]:
    """One step down, the boldest first."""
    candidates = []
    if len(program.outputs) > 1:
        candidates += [_rebuilt(program, outputs=(o,)) for o in program.outputs]
    if len(program.sizes) > 1:
        candidates += [dataclasses.replace(program, sizes=program.sizes[:-1])]
    for i in reversed(range(len(program.statements))):
        candidates.append(_without(program, i))
    for i, statement in enumerate(program.statements):
        if len(statement.defines) == 1:
            candidates += [_bypass(program, i, operand) for operand in statement.reads]
    return [c for c in candidates if c is not None and len(c.statements) + len(c.outputs) + len(c.sizes) < _weight(program)]


def _weight(program: Program) -> int:
    return len(program.statements) + len(program.outputs) + len(program.sizes)


def _rebuilt(program: Program, **changes: Any) -> Program:
    """Apply the changes, drop statements that no result depends on (mutations stay with what they mutate), and inputs."""
    changed = dataclasses.replace(program, **changes)
    needed, kept = set().union(*map(names_in, changed.outputs)), []
    for statement in reversed(changed.statements):
        if statement.mutates or needed & set(statement.defines):
            kept.append(statement)
            needed |= set(statement.reads)
    return prune(dataclasses.replace(changed, statements=tuple(reversed(kept))))


def _without(program: Program, index: int) -> Program | None:
    """The program without one statement and all that depends on it; its operands become results when none is left."""
    gone, kept = set(program.statements[index].defines), []
    for i, statement in enumerate(program.statements):
        if i == index or gone & set(statement.reads):
            gone |= set(statement.defines)
        else:
            kept.append(statement)
    outputs = tuple(o for o in program.outputs if not names_in(o) & gone)
    outputs = outputs or program.statements[index].reads[-1:]
    return _rebuilt(program, statements=tuple(kept), outputs=outputs) if outputs else None


def _bypass(program: Program, index: int, operand: str) -> Program:
    """The program with one statement left out and its result replaced by one of its operands."""
    (name,) = program.statements[index].defines
    swap = {name: operand}
    statements = [
        dataclasses.replace(
            s,
            text=rename(s.text, swap),
            reads=tuple(swap.get(r, r) for r in s.reads),
            mutates=tuple(swap.get(m, m) for m in s.mutates),
        )
        for i, s in enumerate(program.statements)
        if i != index
    ]
    return _rebuilt(program, statements=tuple(statements), outputs=tuple(rename(o, swap) for o in program.outputs))


def _runs(program: Program) -> bool:
    """Whether eager and the worlds can execute it for every size set."""
    try:
        for sizes in program.sizes:
            world = World(sizes, program.seed)
            for given in program.inputs:
                world.bind(given)
            for statement in program.statements:
                world.apply(statement)
                if world.unsound(statement):
                    return False
            for output in program.outputs:
                eval(output, SCOPE, world.actual)
    except (*REFUSALS, NameError):
        return False
    return True


def reproduction(program: Program, result: Result, backend: str) -> str:
    """What a failing test prints: the command, the verdict, the source."""
    return (
        f"seed {program.seed}, backend {backend}: {result.kind} with size set {result.run}: {result.detail}\n"
        f"again: python -m tests.generate {program.seed} --backend {backend} --shrink\n\n{program.source}"
    )
