"""A generated program as data: inputs, statements, outputs; its standalone source; running it in eager and in float64."""

from __future__ import annotations

import itertools
import linecache
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any

import torch

Env = dict[str, Any]

PREAMBLE = '''\
import torch
import torch.nn.functional as F


def data(seed, shape, dtype, kind, layout="contiguous", high=1):
    """A tensor with contents `kind` and memory layout `layout`, the same for the same arguments."""
    g = torch.Generator().manual_seed(seed)
    ndim = len(shape)
    stored = list(shape)
    if layout == "transposed" and ndim >= 2:
        stored[-1], stored[-2] = stored[-2], stored[-1]
    elif layout == "strided" and ndim >= 1:
        stored[-1] = stored[-1] * 2 + 1
    elif layout == "offset" and ndim >= 1:
        stored[0] = stored[0] + 1
    elif layout == "expanded" and ndim >= 1:
        stored[0] = min(stored[0], 1)
    if kind == "index":
        x = torch.randint(0, max(high, 1), stored, generator=g)
    elif kind == "integral":
        x = torch.randint(-4, 5, stored, generator=g)
    elif kind == "bool":
        x = torch.randint(0, 2, stored, generator=g)
    elif kind == "positive":
        x = torch.rand(stored, generator=g, dtype=torch.float64) + 0.1
    else:
        x = torch.randn(stored, generator=g, dtype=torch.float64)
    if kind == "special":
        odd = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 3e4, -2.0**-14]
        where = torch.rand(stored, generator=g) < 0.4
        x = torch.where(where, torch.tensor(odd, dtype=x.dtype)[torch.randint(0, len(odd), stored, generator=g)], x)
    x = x.to(dtype)
    if layout == "transposed" and ndim >= 2:
        x = x.transpose(-1, -2)
    elif layout == "strided" and ndim >= 1:
        x = x[..., 1::2]
    elif layout == "offset" and ndim >= 1:
        x = x[1:]
    elif layout == "expanded" and ndim >= 1:
        x = x.expand(shape)
    return x
'''

MAIN = """\
if __name__ == "__main__":
    import sys

    backend = sys.argv[1] if len(sys.argv) > 1 else "plait"
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic={dynamic})
    for sizes in SIZES:
        print(sizes)
        torch.testing.assert_close(compiled(*inputs(**sizes)), program(*inputs(**sizes)), equal_nan=True)
"""

_NAME = re.compile(r"(?<![\w.'\"])[a-z]\w*")
_LOW = re.compile(r"torch\.(float32|float16|bfloat16)\b")
_serial = itertools.count()


@dataclass(frozen=True)
class Input:
    """One argument: `text` is a call of the preamble's `data` over the size names."""

    name: str
    text: str


@dataclass(frozen=True)
class Statement:
    """One line of the program.

    `numerics`: "exact" rounds nothing, so another implementation may not differ at all; "ring" (sums and products) is
    exact on small integers; "rounded" may differ in the last places. `degree` is the power of the operands' magnitude that
    bounds the terms of a sum inside the statement, 0 where there is none.
    """

    text: str
    reads: tuple[str, ...]
    defines: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    numerics: str = "rounded"
    degree: int = 0

    @cached_property
    def code(self) -> CodeType:
        return compile(self.text, "<statement>", "exec")

    @cached_property
    def code64(self) -> CodeType:
        return compile(_LOW.sub("torch.float64", self.text), "<statement in float64>", "exec")


@dataclass(frozen=True)
class Program:
    """`fn(*inputs())` in `source`. `sizes` holds one set of sizes per run; more than one means dynamic sizes."""

    seed: int
    inputs: tuple[Input, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    sizes: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def dynamic(self) -> bool:
        return len(self.sizes) > 1

    @property
    def description(self) -> str:
        """One line: seed, number of statements, dtypes of the inputs, sizes."""
        dtypes = sorted({d for i in self.inputs for d in re.findall(r"torch\.(\w+)", i.text)})
        sizes = "; ".join(", ".join(f"{k}={v}" for k, v in run) for run in self.sizes)
        kind = "dynamic" if self.dynamic else "static"
        return f"seed {self.seed}: {len(self.statements)} statements, {', '.join(dtypes)}; {kind} sizes {sizes}"

    @cached_property
    def source(self) -> str:
        """Standalone Python: `inputs(**sizes)`, `program(*inputs)`, `SIZES`, and a main that compares with eager."""
        sizes = ", ".join(name for name, _ in self.sizes[0])
        lines = [f'"""Generated program, {self.description}."""', "", PREAMBLE, "", f"def inputs({sizes}):"]
        lines += [f"    {i.name} = {i.text}" for i in self.inputs]
        lines += [f"    return [{', '.join(i.name for i in self.inputs)}]", "", ""]
        lines += [f"def program({', '.join(i.name for i in self.inputs)}):"]
        lines += [f"    {s.text}" for s in self.statements]
        lines += [f"    return {', '.join(self.outputs)}" + ("," if len(self.outputs) == 1 else ""), "", ""]
        lines += [f"SIZES = [{', '.join(str(dict(run)) for run in self.sizes)}]", "", "", MAIN.format(dynamic=self.dynamic)]
        return "\n".join(lines)

    @cached_property
    def _module(self) -> Env:
        # a name per load, in linecache: tracebacks and Dynamo then show the generated lines
        name = f"<generated {self.seed}.{next(_serial)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: Env = {"__name__": "generated"}
        exec(compile(self.source, name, "exec"), scope)
        return scope

    @property
    def fn(self) -> Callable[..., tuple]:
        """The program as a Python function."""
        return self._module["program"]

    def make_inputs(self, run: int = 0) -> list[torch.Tensor]:
        """Fresh arguments for size set `run`."""
        return self._module["inputs"](**dict(self.sizes[run]))


def names_in(text: str) -> set[str]:
    """The variables (and modules) that an expression mentions."""
    return set(_NAME.findall(text))


def rename(text: str, swap: dict[str, str]) -> str:
    """The expression with variables replaced."""
    return _NAME.sub(lambda m: swap.get(m[0], m[0]), text)


SCOPE: Env = {}
exec(PREAMBLE, SCOPE)


@contextmanager
def in_float64() -> Iterator[None]:
    """Default dtype float64, so that an int divided by an int promotes as far as everything else does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widen(x: Any) -> Any:
    """Floating tensors to float64; everything else (and float64 itself, as a copy) as it is."""
    return x.to(torch.float64, copy=True) if isinstance(x, torch.Tensor) and x.dtype.is_floating_point else x


def step(statement: Statement, env: Env, *, wide: bool = False) -> None:
    """Execute one statement in `env`; `wide` in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if wide:
            with in_float64():
                exec(statement.code64, SCOPE, env)
        else:
            exec(statement.code, SCOPE, env)
