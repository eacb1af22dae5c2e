"""Grow a program statement by statement: draw an entry of the catalogue, propose a line, keep it if the worlds accept."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .program import Input, Program, Statement, names_in
from .worlds import Worlds

Dim = tuple[int, ...]  # one dimension's sizes over the size sets
Sizes = tuple[tuple[str, int], ...]

FLOATS = (torch.float32,) * 4 + (torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LAYOUTS = ("contiguous",) * 5 + ("transposed", "strided", "offset", "expanded")
MAX_INPUTS = 7


class NoCandidate(Exception):
    """No value of the program so far suits the entry that was drawn."""


@dataclass(frozen=True)
class Draft:
    """A proposed line: an expression that yields `outs` values, or (with `mutates`) a statement of its own."""

    text: str
    reads: tuple[str, ...]
    outs: int = 1
    numerics: str = "rounded"
    degree: int = 0
    mutates: tuple[str, ...] = ()


Maker = Callable[["Builder"], Draft]


@dataclass
class Builder:
    """State of a growing program; the catalogue's makers ask it for values, sizes, constants and fresh inputs."""

    rng: random.Random
    seed: int
    sizes: tuple[Sizes, ...]
    inputs: list[Input] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.worlds = Worlds(self.sizes, self.seed)
        self.symbols: dict[str, Dim] = {n: tuple(dict(s)[n] for s in self.sizes) for n, _ in self.sizes[0]}

    # -- what is there ------------------------------------------------------------------------------------------------
    def tensor(self, name: str) -> torch.Tensor:
        return self.worlds.value(name)

    def dims(self, name: str) -> tuple[Dim, ...]:
        return self.worlds.dims(name)

    def pick(
        self,
        kind: str = "any",
        *,
        ndim: tuple[int, int] = (0, 9),
        where: Callable[[str], bool] = lambda name: True,
        writable: bool = False,
    ) -> str:
        """A tensor of `kind` (any, float, number, int, bool), later ones more often. Raises NoCandidate."""
        fits = [n for n in self.names if self._is(n, kind) and ndim[0] <= self.tensor(n).ndim <= ndim[1] and where(n)]
        if writable:
            given = {i.name for i in self.inputs}
            fits = [n for n in fits if n not in given or self.rng.random() < 0.15]
        if not fits:
            raise NoCandidate(kind)
        return self.rng.choices(fits, weights=[1 + 8 * (i / len(fits)) ** 2 for i in range(len(fits))])[0]

    def _is(self, name: str, kind: str) -> bool:
        dtype = self.tensor(name).dtype
        if kind == "float":
            return dtype.is_floating_point
        if kind == "bool":
            return dtype == torch.bool
        if kind == "int":
            return not dtype.is_floating_point and dtype != torch.bool
        return kind == "any" or dtype != torch.bool

    def partner(self, name: str, kind: str = "any", *, scalars: bool = True) -> str:
        """Another operand that broadcasts with `name`: a value, a slice or reshape of one, a fresh input, or a number."""
        roll = self.rng.random()
        if scalars and roll < 0.2:
            return self.scalar()
        mine = self.dims(name)
        fits = [n for n in self.names if self._is(n, kind) and broadcasts(self.dims(n), mine)]
        if fits and roll < 0.8:
            return self.rng.choice(fits)
        keep = self.rng.randint(0, len(mine))
        dims = tuple((1,) * len(self.sizes) if self.rng.random() < 0.3 else d for d in mine[len(mine) - keep :])
        return self.fresh(dims, kind)

    def same_shape(self, name: str, kind: str = "any") -> str:
        """A value with the very shape of `name`, possibly itself."""
        return self.pick(kind, where=lambda n: self.dims(n) == self.dims(name))

    # -- text ---------------------------------------------------------------------------------------------------------
    def scalar(self) -> str:
        """A Python number; now and then a size."""
        roll = self.rng.random()
        if roll < 0.15:
            name = self.pick(ndim=(1, 9))
            return f"{name}.shape[{self.axis(name)}]"
        if roll < 0.5:
            return str(self.rng.choice([-3, -2, -1, 0, 1, 2, 3, 5]))
        return repr(self.rng.choice([-2.5, -1.0, -0.5, 0.1, 0.5, 0.75, 1.5, 3.0]))

    def axis(self, name: str) -> int:
        """A dimension's index, at times counted from the end. Raises NoCandidate for a 0-d tensor."""
        ndim = self.tensor(name).ndim
        if not ndim:
            raise NoCandidate("0-d")
        return self.rng.randrange(-ndim, ndim)

    def size(self, dim: Dim) -> str:
        """Text for a dimension in the program: a literal when it never changes, else a value's `.shape[i]`."""
        places = [(n, i) for n in self.names for i, d in enumerate(self.dims(n)) if d == dim]
        if len(set(dim)) == 1 and (not places or self.rng.random() < 0.7):
            return str(dim[0])
        if not places:
            raise NoCandidate("size")
        name, i = self.rng.choice(places)
        return f"{name}.shape[{i}]"

    def symbol(self, dim: Dim) -> str:
        """Text for a dimension in `inputs`: a literal, a size name, or a multiple of one."""
        if len(set(dim)) == 1:
            return str(dim[0])
        for name, sizes in self.symbols.items():
            if sizes == dim:
                return name
            for k in (2, 3, 4):
                if tuple(k * s for s in sizes) == dim:
                    return f"{k} * {name}"
        raise NoCandidate("symbol")

    # -- fresh inputs -------------------------------------------------------------------------------------------------
    def fresh(self, dims: Sequence[Dim], kind: str = "any", *, high: int = 1, dtype: torch.dtype | None = None) -> str:
        """A new argument of the program; kind also "index" (0 <= value < high). Raises NoCandidate when there are enough."""
        if len(self.inputs) >= MAX_INPUTS:
            raise NoCandidate("inputs")
        if kind in ("any", "number"):
            kind = self.rng.choices(["float", "int", "bool" if kind == "any" else "float"], weights=[7, 2, 1])[0]
        contents = {"int": "integral", "index": "index", "bool": "bool"}.get(kind) or self.rng.choices(
            ["normal", "special", "integral", "positive"], weights=[5, 2, 2, 1]
        )[0]
        dtype = dtype or {"int": self.rng.choice(INTS), "index": torch.int64, "bool": torch.bool}.get(kind)
        dtype = dtype or self.rng.choice(FLOATS)
        layout = self.rng.choice(LAYOUTS)
        name = "abcdefghijkl"[len(self.inputs)]
        sizes = [self.symbol(d) for d in dims]
        shape = f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"
        extra = f', "{layout}", high={high}' if kind == "index" else f', "{layout}"' if layout != "contiguous" else ""
        text = f'data({self.seed * 16 + len(self.inputs)}, {shape}, {dtype}, "{contents}"{extra})'
        given = Input(name, text)
        self.worlds.bind(given)
        self.inputs.append(given)
        self.names.append(name)
        return name

    # -- growing ------------------------------------------------------------------------------------------------------
    def propose(self, maker: Maker) -> bool:
        """Try one line; False when nothing suits or the worlds refuse it."""
        try:
            draft = maker(self)
        except NoCandidate:
            return False
        first = sum(len(s.defines) for s in self.statements)
        reads = tuple(dict.fromkeys(draft.reads))
        if draft.mutates:
            statement = Statement(draft.text, reads, (), draft.mutates, draft.numerics, draft.degree)
        else:
            defines = tuple(f"v{first + i}" for i in range(draft.outs))
            text = f"{', '.join(defines)} = {draft.text}"
            statement = Statement(text, reads, defines, (), draft.numerics, draft.degree)
        if self.worlds.accept(statement):
            return False
        self.statements.append(statement)
        self.names.extend(statement.defines)
        return True

    def finish(self) -> Program:
        """Choose results: what nothing reads, some inner values, now and then a view, an alias, an input or a size."""
        read = {n for s in self.statements for n in s.reads}
        defined = [n for s in self.statements for n in s.defines]
        leaves = [n for n in defined if n not in read]
        results = leaves[-5:] + [n for n in defined if n in read and self.rng.random() < 0.12]
        results = results or defined[-1:] or [self.names[0]]
        extra = []
        if self.rng.random() < 0.25:
            name = self.rng.choice(results)
            extra.append(self.rng.choice([name, f"{name}.unsqueeze(0)", f"{name}.reshape(-1)", f"{name}[None]"]))
        if self.rng.random() < 0.08:
            extra.append(self.inputs[0].name)
        if self.rng.random() < 0.08 and self.tensor(results[0]).ndim:
            extra.append(f"{results[0]}.shape[0]")
        results += extra
        return prune(Program(self.seed, tuple(self.inputs), tuple(self.statements), tuple(results), self.sizes))


def broadcasts(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes broadcast for every size set."""
    pairs = zip(reversed(a), reversed(b), strict=False)
    return all(x == y or set(x) == {1} or set(y) == {1} for x, y in pairs)


def prune(program: Program) -> Program:
    """Drop inputs that nothing reads (one stays)."""
    used = set().union(*(names_in(o) for o in program.outputs), *(s.reads for s in program.statements))
    kept = tuple(i for i in program.inputs if i.name in used)
    return dataclasses.replace(program, inputs=kept or program.inputs[:1])
