"""What every test about graphs uses: the properties that each graph must have, random inputs, comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from plait.ir import Graph, ScalarType, TensorType, Value, difference, parse_graph, print_graph, prune, verify
from plait.passes import Context, Pass, Step, run_pipeline

Sizes = Mapping[sympy.Symbol, int]


def graph(text: str, constants: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """A verified graph from its text."""
    made = parse_graph(text, constants)
    verify(made)
    return made


def all_constants(g: Graph) -> dict[str, torch.Tensor]:
    """Constants of a graph and of every region in it."""
    found = dict(g.constants)
    for node in g.nodes:
        for region in node.regions:
            found.update(all_constants(region))
    return found


def size(d: Any, sizes: Sizes) -> int:
    """A size with numbers put in for its symbols."""
    return d if isinstance(d, int) else int(d.subs(dict(sizes)))


def sizes_of(g: Graph) -> dict[sympy.Symbol, int]:
    """Sizes to run a graph with: the hints, else something small that the range allows."""
    return {s: i.hint if i.hint is not None else max(i.low, 3) for s, i in g.symbols.items()}


def random_tensor(kind: TensorType, generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """A tensor of that type: floats with zeros of both signs among them, integers from 0 to 3."""
    shape = [size(d, sizes) for d in kind.shape]
    strides = [size(d, sizes) for d in kind.strides]
    out = torch.empty_strided(shape, strides, dtype=kind.dtype)
    if kind.dtype.is_floating_point or kind.dtype.is_complex:
        data = torch.randn(shape, generator=generator, dtype=torch.float64)
        data[torch.rand(shape, generator=generator) < 0.1] = -0.0
        data[torch.rand(shape, generator=generator) < 0.1] = 0.0
    else:
        data = torch.randint(0, 2 if kind.dtype is torch.bool else 4, shape, generator=generator)
    if 0 in strides and out.numel():
        base = torch.empty(1, dtype=kind.dtype).fill_(1)
        return torch.as_strided(base.expand(max(out.untyped_storage().nbytes(), 1)).clone(), shape, strides)
    return out.copy_(data)


def random_inputs(g: Graph, seed: int = 0, sizes: Sizes | None = None) -> list[Any]:
    """Inputs that fit a graph's types."""
    generator = torch.Generator().manual_seed(seed)
    values = sizes_of(g) if sizes is None else sizes
    made: list[Any] = []
    for v in g.inputs:
        if isinstance(v.type, TensorType):
            made.append(random_tensor(v.type, generator, values))
        elif isinstance(v.type, ScalarType) and v.type.expr is not None:
            made.append(size(v.type.expr, values))
        else:
            made.append({"int": 3, "float": 1.5, "bool": True}[v.type.kind])  # type: ignore[union-attr]
    return made


def copies(inputs: list[Any]) -> list[Any]:
    """Inputs that may be written to without harm, layouts kept."""
    return [_copy(x) if isinstance(x, torch.Tensor) and 0 not in x.stride() else x for x in inputs]


def _copy(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def run(g: Graph, inputs: list[Any], seed: int = 0) -> list[Any]:
    """Results and written inputs of a graph, interpreted by the references; random ops start from `seed`."""
    given = copies(inputs)
    torch.manual_seed(seed)
    results = list(g.run(*given))
    return results + [given[i] for i, _ in g.writes]


def assert_bit_equal(got: Any, want: Any) -> None:
    """Equal in every bit, the payload and sign of NaN aside; tensors in shape, dtype and strides too."""
    if isinstance(want, torch.Tensor):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        same = (got == want) | ((got != got) & (want != want))
        assert bool(same.all()), f"{got} is not {want}"
        if want.dtype.is_floating_point:
            real = want == want
            assert bool((torch.signbit(got) == torch.signbit(want))[real].all()), "a zero changed its sign"
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_bit_equal(a, b)
    else:
        assert got == want


def assert_structural_equal(got: Graph, want: Graph | str, constants: Mapping[str, torch.Tensor] | None = None) -> None:
    """Structurally equal, names aside; else both texts are shown."""
    expected = graph(want, {**all_constants(got), **(constants or {})}) if isinstance(want, str) else want
    found = difference(got, expected)
    assert found is None, f"{found}\n--- got\n{got}\n--- want\n{expected}"


def check_graph(g: Graph, *, runs: bool = True) -> None:
    """What holds for every graph: the verifier accepts it, its text parses back to an equal graph and prints the same
    again, and it runs, giving what its types promise."""
    verify(g)
    text = print_graph(g)
    back = parse_graph(text, all_constants(g))
    assert_structural_equal(back, g)
    assert print_graph(back, locations=False) == print_graph(g, locations=False)
    if not runs:
        return
    sizes = sizes_of(g)
    results = run(g, random_inputs(g))
    for got, promised in zip(results, g.outputs, strict=False):
        if isinstance(promised, Value) and isinstance(promised.type, TensorType):
            kind = promised.type
            assert tuple(got.shape) == tuple(size(d, sizes) for d in kind.shape), f"{promised!r} has shape {got.shape}"
            assert got.dtype is kind.dtype
            strides = tuple(size(d, sizes) for d in kind.strides)
            assert all(n < 2 or a == b for n, a, b in zip(got.shape, got.stride(), strides, strict=True)), (
                f"{promised!r} has strides {got.stride()}"
            )


def apply(one: Pass, g: Graph, at: Any = "split") -> Step:
    """Run one pass with the verifier on; returns its step."""
    _, steps = run_pipeline(g, [one], Context(at=at), verify="each-pass", facts=one.requires)
    return steps[0]


def check_pass(
    one: Pass, before: str, after: str, constants: Mapping[str, torch.Tensor] | None = None, **fired: int
) -> Step:
    """A pass turns one text into another (dead nodes aside), fires rules as often as said (dashes written as
    underscores), and both graphs give the same bits on random inputs."""
    start = graph(before, constants)
    step = apply(one, start)
    check_graph(step.after)
    assert_structural_equal(prune(step.after), after, constants)
    assert dict(step.fired) == {k.replace("_", "-"): n for k, n in fired.items()} or not fired, step.fired
    for seed in range(3):
        inputs = random_inputs(start, seed)
        assert_bit_equal(run(step.after, inputs), run(start, inputs))
    return step


def refusals(step: Step) -> set[str]:
    """Why rules of a step did not fire, in words."""
    return {str(reason) for _, _, reason in step.refused}
